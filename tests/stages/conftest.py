import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from p2_layout import to_p2

from ratplus_exp import stages
from ratplus_exp.config import validate
from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM
from ratplus_exp.models.loading import load_tokenizer, read_tokenizer
from ratplus_exp.models.saving import save_model

CONF = Path(__file__).parents[2] / "conf"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclasses.dataclass
class Job:
    """`python run.py OVERRIDES`, in this process and with its output in a folder of its own."""

    folder: Path

    def compose(self, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(
                "config",
                [f"output={self.folder}", "tracking=disabled", "device=cpu", *overrides],
                return_hydra_config=True,
            )
        return cfg

    @contextmanager
    def ready(self, *overrides):
        """The composed configuration, with Hydra as a stage finds it."""
        cfg = self.compose(*overrides)
        cfg.hydra.runtime.output_dir = str(self.folder / "job")
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg.hydra
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield cfg

    def __call__(self, *overrides):
        with self.ready(*overrides) as cfg:
            validate(cfg)
            stages.run(cfg)
        return cfg


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Random models of both backbones in the pocket's format: {backbone: folder}."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = read_tokenizer(CONF.parent / "outputs/reference/pocket/models/attention/0")
    for backbone in ("attention", "ratplus"):
        torch.manual_seed(0)
        config = RatPlusConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            memory=backbone == "ratplus",
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        save_model(RatPlusForCausalLM(config), tokenizer, folder / backbone)
    return {name: folder / name for name in ("attention", "ratplus")}


@pytest.fixture(scope="session")
def stock_model(tiny_models, tmp_path_factory):
    """stock_model(cls, **config): a tiny random model as transformers saves it, with the pocket's
    tokenizer: its folder."""
    tokenizer = load_tokenizer(tiny_models["attention"])

    def save(cls, max_shard_size="1GB", **config):
        torch.manual_seed(0)
        sizes = SIZES | {"vocab_size": len(tokenizer), "intermediate_size": 24}
        tokens = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
        folder = tmp_path_factory.mktemp(cls.__name__)
        model = cls(cls.config_class(**(sizes | tokens | config)))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def checkpoint(tiny_models, tmp_path):
    """A random RAT+ model's weights in P2's layout, and the overrides that convert it."""
    size = json.loads((tiny_models["ratplus"] / "config.json").read_text())["vocab_size"]
    torch.manual_seed(1)
    config = RatPlusConfig(**SIZES, vocab_size=size, memory=True)
    model = RatPlusForCausalLM(config)
    torch.save({"task": to_p2(model.state_dict(), config)}, tmp_path / "3.pth")
    sizes = [f"model.architecture.{name}={n}" for name, n in SIZES.items()]
    overrides = [
        "stage=convert",
        "model=ratplus_7b",
        f"checkpoint={tmp_path / '3.pth'}",
        f"model.path={tmp_path / 'converted'}",
        f"stage.tokenizer={tiny_models['ratplus']}",
        f"model.architecture.vocab_size={size}",
        *sizes,
    ]
    return model, overrides


@pytest.fixture
def pair(tiny_models, tmp_path):
    """Overrides for a sweep over two tiny models at 256 tokens, one task and two examples."""
    conf = tmp_path / "conf"
    for folder in ("model", "pair"):
        (conf / folder).mkdir(parents=True)
    names = []
    for backbone, path in tiny_models.items():
        text = (CONF / "model" / f"pocket_{backbone}.yaml").read_text()
        lines = [x for x in text.splitlines() if not x.startswith(("name:", "path:", "sha256:"))]
        names.append(f"{tmp_path.name.replace('-', '_')}_{backbone}")
        lines += [f"name: {names[-1]}", f"path: {path}", "sha256: null"]
        (conf / "model" / f"{names[-1]}.yaml").write_text("\n".join(lines))
    text = (CONF / "pair" / "pocket.yaml").read_text()
    for backbone, name in zip(tiny_models, names, strict=True):
        text = text.replace(f"pocket_{backbone}", name)
    text = text.replace("name: pocket\n", "name: tiny\n").replace("[0, 1, 3]", "[0]")
    (conf / "pair" / "tiny.yaml").write_text(text)
    return [
        f"hydra.searchpath=[file://{conf}]",
        "pair=tiny",
        "data.length=256",
        "data.block_size=4",
        "data.window=8",
        "data.first_token=prefill",
        "data.tasks=[MV]",
        "data.forms.number_digits=4",
        "data.forms.reserve=16",
        "data.examples=2",
        "stage.workers=1",
    ]
