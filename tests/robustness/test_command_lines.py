"""Command lines that cannot be meant: each is refused in one line with a remedy, before anything is
imported that takes time or anything is written."""

import re
import shlex
import subprocess
import sys
import time
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ratplus_exp import main as program
from ratplus_exp.config import CONF, validate
from ratplus_exp.main import message_of

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
REMEDY = re.compile("use |set |write |choose |give |take |leave |needs |must |add |none|lacks")

LINES = """
budget=0 -> write it as 1/16
budget=-1/4 -> write it as 1/16
budget=2 -> write it as 1/16
budget=1/0 -> write it as 1/16
budget=17/16 -> write it as 1/16
budget=half -> write it as 1/16
budget=1//16 -> write it as 1/16
budget=null -> budget
budget=[1/4] -> budget
budget=nan -> write it as 1/16
budget=true -> budget
budget= -> write it as 1/16
budget.fraction=1/4 -> budget
seed=x -> seed is 'x': use a whole number
seed=-1 -> seed is -1: use at least 0
seed=1.5 -> use a whole number
seed=true -> use a whole number
seed=null -> use a whole number
seed= -> use a whole number
seed=[0,1] -> use a whole number
seed=9223372036854775808 -> use less than 4294967296
seed=4294967296 -> use less than 4294967296
selector_seed=9223372036854775808 -> use less than
selector_seed=-1 -> use at least 0
selector_seed=x -> use a whole number
selector=best -> use one of topk, random, oracle
selector= -> use one of topk
selector=null -> use one of topk
selector=[random] -> use one of topk
oracle_heads=[0-0] -> needs selector=oracle
selector=oracle oracle_heads=0-0 -> use a list
selector=oracle oracle_heads=[1.1] -> use text
selector=oracle oracle_heads=[a-b] -> write layer-head
selector=oracle oracle_heads=[1-] -> write layer-head
selector=oracle oracle_heads=[1-0,1-0] -> use each of them once
selector=oracle oracle_heads=[99999999999-0] -> write layer-head
device=tpu -> use auto, cpu or cuda
device=mps -> use auto, cpu or cuda
device=xpu -> use auto, cpu or cuda
device=meta -> use auto, cpu or cuda
device=cuda:x -> use auto, cpu or cuda
device=cuda:-1 -> use auto, cpu or cuda
device=null -> use text
device= -> use auto, cpu or cuda
threads=-1 -> use at least 0
threads=1000000 -> use at most 1024
threads=all -> use a whole number
threads=null -> use a whole number
output= -> use some text
output=null -> use text
output=5 -> use text
results= -> use some text
dry_run=maybe -> use true or false
dry_run=1 -> use true or false
cuda_graphs=x -> use true or false
checkpoint=x -> is for stage=convert
checkpoint= -> use some text
stage=train -> choose one of ablation
stage=null -> use one of them by its name
stage.name=evaluate -> use one of eval
stage.name=null -> stage
stage.colour=red -> no field 'colour'
data.batch_size=x -> use a whole number
data.batch_size=null -> use a whole number
data.batch_size=1.5 -> use a whole number
data.batch_size=100000000000 -> use at most
data.first_token=guess -> use one of prefill, decode
data.first_token=null -> use one of prefill, decode
data.protocol=both -> use one of whole, split
stage=hit_rate data.tasks=[S-1,cwe] -> has no position in the prompt
stage=reads data.tasks=[cwe] -> has no position in the prompt
selector=oracle data.tasks=[qa_1] -> has no position in the prompt
+data.vt.hops=0 -> use at least 1
data.cwe.repeats=[3] -> use a list of at least 2
data.fwe.template=x -> lacks {context}: add it to the text
'data.vt.template="{context}"' -> lacks {query}: add it to the text
'data.vt.hop="VAR {name}"' -> lacks {value}: add it to the text
'data.vt.start="{foo} {name} {value}"' -> has the unknown field {foo}: use only {name}, {value}
'data.cwe.item="{number}."' -> lacks {word}: add it to the text
'+data.qa.document="{number}"' -> lacks {text}: add it to the text
stage=hit_rate data.batch_size=-5 -> use at least 1
stage=random_selector stage.selector_seeds=[] -> at least 1
stage=random_selector stage.selector_seeds=3 -> use a list
stage=random_selector stage.selector_seeds=[0,0] -> use each of them once
stage=random_selector stage.selector_seeds=[-1] -> use at least 0
stage=random_selector stage.workers=x -> use a whole number
stage=random_selector stage.workers=100000 -> use at most 1024
stage=ablation -> use a list of at least 2
stage=ablation stage.models=pocket_ratplus -> use a list, as in [a,b]
stage=ablation stage.models=[pocket_ratplus] -> use a list of at least 2
stage=ablation stage.models=[a,a] -> use each of them once
stage=ablation stage.models=[a,b] stage.methods=[] -> at least 1
stage=ablation stage.models=[a,b] stage.methods=quest -> use a list
stage=ablation stage.models=[a,b] stage.trainings=[] -> at least 1
stage=ablation stage.models=[a,b] stage.trainings=0 -> use a list
stage=ablation stage.models=[a,b] stage.trainings=[x] -> use a whole number
stage=sweep -> choose what it runs, as in experiment=table3
experiment=table3 stage.models=p -> use a list
experiment=table3 stage.models=[p,p] -> use each of them once
experiment=table3 stage.trainings=[-1] -> use at least 0
experiment=table3 stage.workers=x -> use a whole number
experiment=table3 stage.scorer=foo -> use one of exact, substring
experiment=table3 stage.random_examples=0 -> use at least 1
experiment=table3 stage.cells.budgets.method=5 -> stage.cells.budgets.method
experiment=table3 stage.cells.budgets.budget=[2] -> write it as 1/16
experiment=table3 +stage.cells.budgets.colour=red -> no field 'colour': use one of stage, model
experiment=table3 stage.cells=x -> use fields
experiment=table3 +stage.outputs.table9=true -> use one of table2
experiment=table3 stage.outputs.table3=yes_please -> use true or false
stage=report stage.scorer=foo -> use one of exact, substring
stage=report stage.outputs=[table3] -> stage.outputs
stage=report stage.folder= -> use some text
stage=report stage.where=x -> use fields
stage=report stage.models=pocket -> use a list
model=none -> choose one of attention_1b
model=null -> use one of them by its name
model=hf -> model.path is missing: set model.path
model.name= -> use letters, digits
model.name=null -> use text
model.name=5 -> use text
model.name='"=1+1"' -> use letters, digits
model.name='"a|b"' -> use letters, digits
model.name='"**bold**"' -> use letters, digits
model.name='"../x"' -> use letters, digits
model.name='"<b>"' -> use letters, digits
model.tier='"@SUM"' -> use letters, digits
model.path= -> use some text
model.path=null -> use text
model.backbone=mamba -> use one of attention, ratplus
model.training=-1 -> use at least 0
model.training=x -> use a whole number
model.training=1.5 -> use a whole number
model.sha256=x -> use a sha256
model.sha256=5 -> model.sha256
model.colour=red -> no field 'colour'
model.architecture.num_hidden_layers=-1 -> use at least 1
model.architecture.num_hidden_layers=0 -> use at least 1
model.architecture.hidden_size=x -> use a whole number
model.architecture.hidden_size=1.5 -> use a whole number
model.architecture.rope_theta=0 -> use more than 0
rope={rope_type:longrope} -> use one of default, linear, yarn, llama3
rope={factor:2} -> rope.rope_type is missing: set it
rope={rope_type:yarn,factor:0.5} -> use at least 1
positions=0 -> use at least 1
model.architecture.rope_theta=nan -> use a finite number
model.architecture.initializer_range=2 -> use at most 1
model.architecture.memory_kind=lstm -> use one of gate, ema
model.architecture.memory_on=q -> use one of kv, k, v, select
model.architecture.gate_bias=[1] -> gate_bias
model.architecture.gate_bias=x -> gate_bias
+model.architecture.colour=red -> no field 'colour'
+model.architecture.layers=3 -> no field 'layers'
data=english -> choose one of pocket, ruler, ruler1024, small
data.length=1 -> use at least 2
data.length=x -> use a whole number
data.length=1e3 -> use a whole number
data.length=10000000000 -> use at most
data.block_size=0 -> use at least 1
data.window=0 -> use at least 1
data.window=x -> use a whole number
data.batch_size=0 -> use at least 1
data.tasks=[] -> at least 1
data.tasks=null -> use a list
data.tasks=S-1 -> use a list
data.tasks=[S-9] -> use one of S-1
data.tasks=[S-1,S-1] -> use each of them once
data.tasks=[1] -> use one of S-1
data.examples=0 -> use at least 1
data.examples=-5 -> use at least 1
data.examples=100000000000 -> use at most 1000000
data.examples=all -> use a whole number
data.essay= -> use some text
data.essay=5 -> use text
data.path= -> use some text
data.colour=red -> no field 'colour': use one of name, length
data.forms=null -> use fields
data.forms.needle=x -> add it to the text
data.forms.template=x -> lacks
data.forms.needle='"{key} {value} {other}"' -> use only
data.forms.noise= -> give the sentence
data.forms.reserve=0 -> use at least 1
data.forms.number_digits=1 -> use at least 2
data.forms.number_digits=99 -> use at most 18
data.forms.number_digits=abc -> use a whole number
data.forms.key_count=0 -> use at least 1
data.forms.key_count=1000000 -> use 1 to
data.forms.key_words=verb -> use one of pair, noun
data.forms.uuid=long -> use one of uuid4
data.forms.answer_order=random -> use one of creation
data.forms.lowercase=5 -> use true or false
+data.forms.colour=red -> no field 'colour'
method=guess -> there is no method guess: choose one of adakv, dense, dilated
method=null -> use one of them by its name
~method -> method.name is missing
method.name=null -> use text
method.name=5 -> use text
method.name=true -> use text
method.name='"=cmd"' -> use letters, digits
method.target= -> use some text
method.target=Quest -> use a class
method.target=null -> use text
method.top_k=-1 -> use at least 0
method.top_k=x -> use a whole number
method.top_k=1.5 -> use a whole number
method.top_k=10000000000000000000000 -> use at most
method.block_size=0 -> use at least 1
method.block_size=8.5 -> use a whole number
method.colour=red -> no field 'colour'
+method.colour=red -> no field 'colour': use one of block_size, top_k
+method.window=8 -> no field 'window'
method=dense +method.block_size=8 -> no field 'block_size': it has none
method=snapkv method.window=0 -> use at least 1
method=snapkv method.window=8.5 -> use a whole number
method=snapkv method.pooling=sum -> use one of avg, max, none
method=snapkv method.kernel=4 -> use an odd number
method=snapkv method.kernel=-1 -> use at least 1
method=dilated method.dilation=-1 -> use at least 0
method=dilated method.local=-1 -> use at least 0
method=dilated method.initial=x -> use a whole number
tracking=cloud -> choose one of disabled
tracking.mode=x -> use one of online, offline, disabled
tracking.project= -> use letters, digits
tracking.entity=5 -> use text
tracking.group= -> use letters, digits
cluster.gpus=0 -> use at least 1
cluster.gpus=x -> use a whole number
cluster.mfu=0 -> use more than 0
cluster.mfu=2 -> use at most 1
cluster.mfu=nan -> use a finite number
cluster.peak_tflops=0 -> use more than 0
cluster.memory_gb=-1 -> use more than 0
cluster.bandwidth_tb=inf -> use a finite number
cluster.bandwidth_tb=x -> use a number
pair=none -> choose one of olmo2_7b
pair.models=x -> use a list
pair.trainings=[] -> at least 1
pair.name= -> use letters, digits
experiment=none -> choose one of
experiment=[table3,none] -> choose one of
corpus=none -> corpus
stage=tokenize corpus=none -> choose one of fineweb_edu
stage=tokenize corpus.path= -> use some text
stage=tokenize corpus.tokens=0 -> use at least 1
stage=tokenize corpus.tokens=x -> use a whole number
stage=tokenize corpus.field= -> use letters, digits
stage=tokenize corpus=local -> corpus.path is missing
stage=tokenize stage.workers=-1 -> use at least 0
stage=convert stage.dtype=int8 -> use one of bfloat16
stage=convert stage.tokenizer= -> use some text
stage=pretrain stage.schedule=[] -> at least 1
stage=pretrain stage.schedule=x -> use a list
stage=pretrain stage.schedule=[512,64] -> use a list
stage=pretrain stage.schedule=[[512]] -> missing
stage=pretrain stage.schedule=[[512,64,3]] -> stage.schedule
stage=pretrain stage.schedule=[[0,64]] -> use at least 1
stage=pretrain stage.schedule=[[-512,64]] -> use at least 1
stage=pretrain stage.schedule=[[512,0]] -> use at least 2
stage=pretrain stage.schedule=[[a,b]] -> use a whole number
stage=pretrain stage.tokens_per_step=0 -> use at least 1
stage=pretrain stage.tokens_per_step=x -> use a whole number
stage=pretrain stage.drill_tokens=-1 -> use at least 0
stage=pretrain stage.drill_tokens=x -> use a whole number
stage=pretrain stage.sparse_only_tokens=-1 -> use at least 0
stage=pretrain stage.several_rate=2 -> use at most 1
stage=pretrain stage.several_rate=nan -> use a finite number
stage=pretrain stage.other_rate=-0.1 -> use at least 0
stage=pretrain stage.workers=-1 -> use at least 0
stage=pretrain stage.folder= -> use some text
stage=pretrain stage.init= -> use some text
stage=pretrain stage.joint=x -> use fields
stage=pretrain stage.prefix=dense -> use one of random, prompt
stage=pretrain stage.joint={local:-1} -> use at least 0
stage=pretrain stage.joint={dilation:x} -> use a whole number
stage=pretrain stage.joint={depth:1} -> no field 'depth'
stage=pretrain +stage.styles=x -> use a list
stage=pretrain +stage.styles=[{colour:red}] -> no field 'colour'
stage=pretrain +stage.styles=[{needle:x}] -> add it to the text
stage=pretrain stage.optimizer=null -> use fields
stage=pretrain stage.optimizer.lr=-1 -> use at least 0
stage=pretrain stage.optimizer.lr=inf -> use a finite number
stage=pretrain stage.optimizer.lr=x -> use a number
stage=pretrain stage.optimizer.memory_lr=nan -> use a finite number
stage=pretrain stage.optimizer.min_lr_ratio=2 -> use at most 1
stage=pretrain stage.optimizer.warmup=5 -> use less than 1
stage=pretrain stage.optimizer.warmup=1 -> use less than 1
stage=pretrain stage.optimizer.weight_decay=-0.1 -> use at least 0
stage=pretrain stage.optimizer.betas=[0.9] -> missing
stage=pretrain stage.optimizer.betas=[0.9,1] -> use less than 1
stage=pretrain stage.optimizer.betas=0.9 -> use a list
stage=pretrain stage.optimizer.clip=-1 -> use more than 0
stage=pretrain stage.optimizer.clip=0 -> use more than 0
stage=pretrain stage.optimizer.spike=1 -> use more than 1
stage=pretrain stage.optimizer.decay=some -> use one of matrices, all
stage=pretrain stage.optimizer.parallel=tensor -> use one of fsdp, ddp
stage=pretrain stage.optimizer.precision=fp17 -> use one of auto, fp32, bf16
stage=pretrain stage.optimizer.rows_per_pass=0 -> use at least 1
stage=pretrain stage.optimizer.peak_tflops=0 -> use more than 0
stage=pretrain stage.optimizer.log_every=0 -> use at least 1
stage=pretrain stage.optimizer.checkpoint_every=3 -> must be a multiple
stage=pretrain stage.optimizer.compile=x -> use true or false
stage=pretrain +stage.optimizer.speed=1 -> no field 'speed': use one of lr
stage=sft stage.mixture=x -> use fields
stage=sft stage.mixture.S-1=-1 -> use at least 0
stage=sft stage.mixture.S-1=nan -> use a finite number
stage=sft +stage.mixture.S-9=1 -> use one of S-1
stage=continued_pretrain stage.init= -> use some text
methd=quest -> no field 'methd': use one of model, method
quest -> write name=value
data.essay=a(b -> quote a value
data.essay=a=b#c( -> quote a value
model.path='[' -> quote a value
"""
TABLE = [tuple(line.split(" -> ")) for line in LINES.strip().splitlines()]


@cache
def composed(groups):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(groups))


def refuse(words, folder):
    """What `python run.py WORDS` says; groups are composed once for all lines that share them."""
    began = time.process_time()
    try:
        parsed = OverridesParser.create().parse_overrides([f"output={folder}", *words])
        groups = [o.input_line for o in parsed if o.key_or_group.split("@")[0] in GROUPS]
        cfg = composed(tuple(groups)).copy()
        rest = [o for o in parsed if o.input_line not in groups]
        ConfigLoaderImpl._apply_overrides_to_config(rest, cfg)
        validate(cfg)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        return " ".join(message_of(error).split()), time.process_time() - began
    pytest.fail(f"{' '.join(words)} was taken")


@pytest.mark.parametrize(("line", "remedy"), TABLE)
def test_is_refused_with_its_remedy(line, remedy, tmp_path):
    composed(())  # Hydra's own start is not the refusal's
    message, seconds = refuse(shlex.split(line), tmp_path)
    assert remedy in message and len(message) < 1000, message
    assert REMEDY.search(message), message
    assert "Traceback" not in message and seconds < 1
    assert not any(tmp_path.iterdir())


def test_the_table_is_long_enough():
    assert len(TABLE) == len(set(TABLE)) >= 300


@pytest.mark.parametrize("group", GROUPS)
def test_an_option_that_is_not_there_is_refused_with_those_that_are(group, tmp_path):
    stage = [] if group == "stage" else ["stage=continued_pretrain"]
    where = "optimizer@stage.optimizer" if group == "optimizer" else group
    message, _ = refuse([*stage, f"{where}=guess"], tmp_path)
    assert message.startswith(f"there is no {group} guess: choose one of ")


def run(*words, code="from ratplus_exp.main import command; command()", **how):
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, **how
    )


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        ("--help", []),
        ("seed=x", []),
        ("method=guess", []),
        ("method=tova method.top_k=abc", ["torch"]),
        ("method=snapkv budget=1/3", ["torch"]),
    ],
)
def test_words_wait_for_no_heavy_import(words, loaded, tmp_path):
    script = """
import atexit, sys
from ratplus_exp.main import command
heavy = ("torch", "transformers", "wandb", "pandas", "matplotlib")
atexit.register(lambda: print("loaded:", [name for name in heavy if name in sys.modules]))
command()
"""
    done = run(*words.split(), f"output={tmp_path}", code=script)
    assert done.stdout.splitlines()[-1] == f"loaded: {loaded}", done.stdout
    assert done.returncode == (words != "--help")
    if done.returncode:
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ")


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "main", interrupted)
    with pytest.raises(SystemExit) as stop:
        program.command()
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip().count("\n") == 0
