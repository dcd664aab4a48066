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
budget=1/0 -> write it as 1/16
budget=half -> write it as 1/16
budget=null -> budget
budget=true -> budget
budget.fraction=1/4 -> budget
seed=x -> seed is 'x': use a whole number
seed=-1 -> seed is -1: use at least 0
seed=1.5 -> use a whole number
seed=true -> use a whole number
seed=null -> use a whole number
seed= -> use a whole number
seed=[0,1] -> use a whole number
seed=4294967296 -> use less than 4294967296
selector=best -> use one of topk, random, oracle
selector=null -> use one of topk
oracle_heads=[0-0] -> needs selector=oracle
selector=oracle oracle_heads=0-0 -> use a list
selector=oracle oracle_heads=[1.1] -> use text
selector=oracle oracle_heads=[a-b] -> write layer-head
selector=oracle oracle_heads=[1-0,1-0] -> use each of them once
device=mps -> use auto, cpu or cuda
device=cuda:-1 -> use auto, cpu or cuda
threads=1000000 -> use at most 1024
output= -> use some text
output=5 -> use text
dry_run=1 -> use true or false
checkpoint=x -> is for stage=convert
stage=train -> choose one of ablation
stage=null -> use one of them by its name
stage.name=evaluate -> use one of eval
stage.name=null -> stage
data.batch_size=100000000000 -> use at most
stage=hit_rate data.tasks=[S-1,cwe] -> has no position in the prompt
stage=reads data.tasks=[cwe] -> has no position in the prompt
selector=oracle data.tasks=[qa_1] -> has no position in the prompt
data.cwe.repeats=[3] -> use a list of at least 2
data.fwe.template=x -> lacks {context}: add it to the text
'data.vt.start="{foo} {name} {value}"' -> has the unknown field {foo}: use only {name}, {value}
'+data.qa.document="{number}"' -> lacks {text}: add it to the text
stage=random_selector stage.selector_seeds=[-1] -> use at least 0
stage=ablation -> use a list of at least 2
stage=ablation stage.models=[a,a] -> use each of them once
stage=sweep -> choose what it runs, as in experiment=table3
experiment=table3 stage.cells.budgets.budget=[2] -> write it as 1/16
experiment=table3 +stage.cells.budgets.colour=red -> no field 'colour': use one of stage, model
experiment=table3 stage.cells=x -> use fields
experiment=table3 +stage.outputs.table9=true -> use one of table2
experiment=table3 stage.outputs.table3=yes_please -> use true or false
stage=report stage.outputs=[table3] -> stage.outputs
stage=report stage.where=x -> use fields
model=none -> choose one of attention_1b
model=hf -> model.path is missing: set model.path
model.name='"=1+1"' -> use letters, digits
model.name='"../x"' -> use letters, digits
model.sha256=x -> use a sha256
model.architecture.rope_theta=0 -> use more than 0
rope={rope_type:longrope} -> use one of default, linear, yarn, llama3
rope={factor:2} -> rope.rope_type is missing: set it
rope={rope_type:yarn,factor:0.5} -> use at least 1
model.architecture.gate_bias=[1] -> gate_bias
data=english -> choose one of pocket, ruler, ruler1024, small
data.length=1e3 -> use a whole number
data.tasks=S-1 -> use a list
data.tasks=[S-9] -> use one of S-1
data.forms=null -> use fields
data.forms.needle=x -> add it to the text
data.forms.needle='"{key} {value} {other}"' -> use only
data.forms.noise= -> give the sentence
data.forms.key_count=1000000 -> use 1 to
method=guess -> there is no method guess: choose one of adakv, dense, dilated
~method -> method.name is missing
method.target=Quest -> use a class
method.top_k=10000000000000000000000 -> use at most
method.colour=red -> no field 'colour'
+method.colour=red -> no field 'colour': use one of block_size, top_k
method=dense +method.block_size=8 -> no field 'block_size': it has none
method=snapkv method.kernel=4 -> use an odd number
tracking=cloud -> choose one of disabled
cluster.bandwidth_tb=inf -> use a finite number
cluster.bandwidth_tb=x -> use a number
pair=none -> choose one of olmo2_7b
experiment=[table3,none] -> choose one of
corpus=none -> corpus
stage=tokenize corpus=none -> choose one of fineweb_edu
stage=tokenize corpus=local -> corpus.path is missing
stage=pretrain stage.schedule=[] -> at least 1
stage=pretrain stage.schedule=[[512]] -> missing
stage=pretrain stage.schedule=[[512,64,3]] -> stage.schedule
stage=pretrain stage.schedule=[[0,64]] -> use at least 1
stage=pretrain stage.schedule=[[a,b]] -> use a whole number
stage=pretrain stage.joint={local:-1} -> use at least 0
stage=pretrain +stage.styles=x -> use a list
stage=pretrain +stage.styles=[{colour:red}] -> no field 'colour'
stage=pretrain +stage.styles=[{needle:x}] -> add it to the text
stage=pretrain stage.optimizer.warmup=1 -> use less than 1
stage=pretrain stage.optimizer.betas=[0.9,1] -> use less than 1
stage=pretrain stage.optimizer.betas=0.9 -> use a list
stage=pretrain stage.optimizer.checkpoint_every=3 -> must be a multiple
stage=sft stage.mixture=x -> use fields
stage=sft stage.mixture.S-1=-1 -> use at least 0
stage=sft stage.mixture.S-1=nan -> use a finite number
stage=sft ~stage.mixture '+stage.mixture={S-1:0}' -> give some task a positive weight
stage=sft ~stage.mixture '+stage.mixture={}' -> give some task a positive weight
stage=sft +stage.mixture.S-9=1 -> use one of S-1
methd=quest -> no field 'methd': use one of model, method
quest -> write name=value
data.essay=a(b -> quote a value
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


@pytest.mark.parametrize("group", GROUPS)
def test_an_option_that_is_not_there_is_refused_with_those_that_are(group, tmp_path):
    stage = [] if group == "stage" else ["stage=continued_pretrain"]
    message, _ = refuse([*stage, f"{group}=guess"], tmp_path)
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
