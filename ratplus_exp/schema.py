"""Every field of the configuration, with its type, bounds and default (`settings.build`).

Hydra uses the defaults of the root; the fields of a stage are in `stage_schema`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from omegaconf import MISSING
from pydantic import Field

from ratplus_exp.settings import (
    OF_LIST,
    Amount,
    Distinct,
    Dtype,
    Examples,
    FirstToken,
    Fraction,
    Length,
    Name,
    Names,
    Positive,
    Protocol,
    Seed,
    Seeds,
    Selector,
    Settings,
    Share,
    Source,
    Text,
    Threads,
    Whole,
    matching,
)
from ratplus_exp.stage_schema import Stage, Task
from ratplus_exp.tasks import TASKS, Forms
from ratplus_exp.tasks.others import CWE, FWE, VT
from ratplus_exp.tasks.qa import QA

Digest = Annotated[str, matching("[0-9a-f]{64}", "use a sha256, 64 hexadecimal digits, or null")]
Head = Annotated[str, matching(r"\d{1,6}-\d{1,6}", "write layer-head, as in [1-0,1-3]")]
Device = Annotated[str, matching(r"auto|cpu|cuda(:\d\d?)?", "use auto, cpu or cuda")]
Lengths = Annotated[tuple[Amount, Amount], OF_LIST]
EMPTY: Any = dict  # no fields in the configuration: the class has the defaults
NO_FILES: Any = partial(dict, squad=None, hotpotqa=None)  # which the command line can set


@dataclass(frozen=True, kw_only=True)
class Architecture(Settings):
    """Fields of Hugging Face's configs, and of the memory (`models.RatPlusConfig`)."""

    model_type: Name | None = None
    vocab_size: Positive | None = None
    hidden_size: Positive | None = None
    intermediate_size: Positive | None = None
    num_hidden_layers: Positive | None = None
    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    max_position_embeddings: Positive | None = None
    rope_theta: Amount | None = None
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    initializer_range: Share | None = None
    hidden_act: Name | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: Positive | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Whole | None = None
    layer_types: list[Name] | None = None
    bos_token_id: Whole | None = None
    eos_token_id: Whole | None = None
    pad_token_id: Whole | None = None
    memory_kind: Literal["gate", "ema", "ema_fixed", "conv", "shift"] | None = None
    memory_on: Literal["kv", "k", "v", "select"] | None = None
    memory_position: Literal["after_norm", "before_norm"] | None = None
    shared_gate: bool | None = None
    output_gate: bool | None = None
    gate_bias: Annotated[float, Field(ge=-100, le=100)] | Lengths | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """A backbone. `path` is a folder in Hugging Face's format and may depend on `training`, as in
    `models/attention/${.training}`."""

    name: Name = MISSING
    tier: Name = MISSING
    backbone: Literal["attention", "ratplus"] = MISSING
    path: Text = MISSING
    training: Seed = 0  # its seed, the same for both backbones of a pair
    # of model.safetensors, or one a training: {0: …, 1: …}
    sha256: Digest | dict[Annotated[Seed, Field(strict=False)], Digest] | None = None
    architecture: Architecture = field(default_factory=EMPTY)  # for training and converting
    tokenizer: Text | None = None  # a folder, for training from scratch; null: built of data.forms


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    name: Name = MISSING
    length: Length = MISSING  # context length in tokens, answer included
    batch_size: Examples = 50  # prompts at a time in evaluation
    block_size: Positive = MISSING  # the tier's block size; 64 in the paper
    window: Positive = MISSING  # SnapKV's observation window; 64 in the paper
    kernel: Positive = MISSING  # of SnapKV's pooling; 5 in its original
    tasks: Annotated[list[Task], Field(min_length=1), Distinct] = field(
        default_factory=lambda: list(TASKS)
    )
    examples: Examples = 100  # a task
    first_token: FirstToken = "prefill"  # what gives an answer's first token
    protocol: Protocol = "whole"  # selection for the whole prompt, or before the question is known
    forms: Forms = field(default_factory=EMPTY)
    vt: VT = field(default_factory=EMPTY)
    cwe: CWE = field(default_factory=EMPTY)
    fwe: FWE = field(default_factory=EMPTY)
    qa: QA = field(default_factory=NO_FILES)
    essay: Text | None = None  # a text file or RULER's PaulGrahamEssays.json; None: generated prose
    path: Text | None = None  # a folder of RULER's own <task>/validation.jsonl to use instead


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Source):
    folder: Text  # of its tokens


@dataclass(frozen=True, kw_only=True)
class PairConfig(Settings):
    """Two models that tables compare, and settings of sweeps over them."""

    name: Name = "cells"  # of the folder of its report
    models: Names = field(default_factory=list)
    adapted: Names = field(default_factory=list)  # the same, each adapted to its pattern
    trainings: Seeds = field(default_factory=lambda: [0])  # of every model
    random_examples: Examples = 100  # a task and seed, for random selection with its five seeds
    workers: Threads = 0


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Settings):
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: Name = "ratplus_exp"
    entity: Name | None = None
    group: Name | None = None  # runs of one sweep


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Settings):
    """The GPUs assumed by dry_run=true: one GH200 by default."""

    gpus: Positive = 1
    peak_tflops: Amount = 989.0  # of one GPU, dense bf16
    memory_gb: Amount = 96.0
    bandwidth_tb: Amount = 4.0  # TB/s of its memory
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4  # share of the peak that training reaches


@dataclass(frozen=True, kw_only=True)
class Rope(Settings):
    """Changes of a model's rope_parameters, in transformers' names. The types "dynamic" and
    "longrope" are left out: under them an answer depends on the lengths of other prompts."""

    rope_type: Literal["default", "linear", "yarn", "llama3"]
    rope_theta: Amount | None = None
    factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    original_max_position_embeddings: Positive | None = None
    attention_factor: Amount | None = None
    beta_fast: Amount | None = None
    beta_slow: Amount | None = None
    low_freq_factor: Amount | None = None
    high_freq_factor: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Settings):
    """The fields of all methods; the others are those of their class."""

    name: Name
    target: Annotated[Text, matching(r"\w+(\.\w+)+", "use a class, as in package.module.Class")]


@dataclass(frozen=True, kw_only=True)
class LayersSettings(MethodConfig):
    """method=layers: names of `methods`, each with the fields of a method."""

    layers: Annotated[list[Name], Field(min_length=1)]
    methods: dict[Name, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The root. Only stages that train on a corpus have one."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    budget: Fraction = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    stage: Annotated[Stage, Field(discriminator="name")] = MISSING
    corpus: CorpusConfig | None = None
    pair: PairConfig = field(default_factory=PairConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: Text | None = None  # stage=convert: one of P2's .pth files, or a .gguf
    selector: Selector = "topk"
    selector_seed: Seed = 0  # of selector=random
    oracle_heads: Annotated[list[Head], Distinct] = field(default_factory=list)  # []: all
    seed: Seed = 0  # of the samples; in training, of the data and the initial weights
    dtype: Dtype | None = None  # of evaluation; null: float32 on a CPU, bfloat16 on a GPU
    rope: Rope | None = None  # of evaluation; null: as the model was saved
    positions: Positive | None = None  # longest context; null: the model's, times rope's factor
    device: Device = "auto"  # auto: a GPU if there is one
    cuda_graphs: bool = True  # on a GPU: replay decoding steps as CUDA graphs
    threads: Threads = 0  # of torch on a CPU; 0: one a core
    dry_run: bool = False  # print the estimated cost of the job, and do nothing
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output: Text = "outputs"
    results: Text = "${output}/results"  # the store
