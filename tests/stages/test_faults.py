"""Jobs that are ended at each of their file operations, and then run again, hold what an
undisturbed one holds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from itertools import count

import pytest

from ratplus_exp.main import command
from ratplus_exp.report import figures
from ratplus_exp.stages import convert, evaluate, hit_rate, report, tokenize, train
from ratplus_exp.store import Store

STAGES = (figures, convert, evaluate, hit_rate, report, tokenize, train)
"""Imported here, so that a forked child need not."""
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "fault.fsync")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMES = ("seconds", "tokens_per_second", "mfu")


@pytest.fixture
def run(tmp_path):
    """run(words, at, number): a command in a child that gets the signal `number` before its `at`-th
    change of a file below `output`; its exit code (negative: killed) and what it wrote to stderr.
    """
    output, said = tmp_path / "out", tmp_path / "stderr"

    def child(words, at, number):
        steps = count(1)

        def hook(event, args):
            change = event in CHANGES or (event == "open" and args[2] & WRITES)
            if change and str(args[0]).startswith(str(output)) and next(steps) == at:
                os.kill(os.getpid(), number)

        fsync = os.fsync
        os.fsync = lambda file: (sys.audit("fault.fsync", str(output)), fsync(file))[1]
        sys.addaudithook(hook)
        common = [
            "tracking=disabled",
            "device=cpu",
            f"output={output}",
            "hydra.run.dir=${output}/job",
        ]
        sys.argv = ["run.py", *common, *words]
        command()

    def run(words, at=0, number=signal.SIGKILL, encoding="utf-8"):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                with said.open("w", encoding=encoding) as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                    sys.stdout = sys.stderr = file
                    child(words, at, number)
                    code = 0
            except SystemExit as end:
                code = end.code
                if isinstance(code, str):  # what the interpreter prints
                    code = said.open("a").write(f"{code}\n") and 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.read_text()

    run.output = output
    return run


def evaluation(tiny_models):
    model = [f"model.path={tiny_models['ratplus']}", "model.sha256=null", "model.training=0"]
    size = ["data.length=256", "data.block_size=4", "data.tasks=[S-1]", "data.examples=3"]
    return [*model, *size, "data.batch_size=2"]


def training():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return [
        "experiment=pocket_attention",
        "model=pocket_attention",
        "stage.init=null",
        *(f"model.architecture.{name}={size}" for name, size in sizes.items()),
        "data.length=128",
        "stage.schedule=[[384,64]]",
        "stage.tokens_per_step=128",
        "stage.optimizer.log_every=1",
        "stage.optimizer.checkpoint_every=1",
        "stage.optimizer.precision=fp32",  # auto may measure another one in a later start
    ]


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return value


def content(folder):
    """What of a folder's files has to be the same, by name: all but times and who ran it when."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in ("provenance.json", "config.json") and "model" not in path.parts:
            found[name] = None
        elif path.suffix == ".jsonl" or path.name == "metrics.json":
            text = path.read_text()
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            found[name] = [without_times(json.loads(line)) for line in lines]
        elif path.is_file() and path.suffix != ".pt" and path.name != "lock":
            found[name] = path.read_bytes()
    return found


@pytest.fixture
def fault(request, run, tiny_models, tmp_path):
    """Of a stage: the words of its command, and the folder that it fills."""
    stage, out = request.param, run.output
    words = [*evaluation(tiny_models), f"stage={stage}"]
    if stage in ("eval", "hit_rate"):
        return words, out / "results"
    if stage == "pretrain":
        return training(), out / "training"
    if stage == "report":
        store = f"results={tmp_path / 'store'}"
        assert run([*words, "stage=eval", store])[0] == 0
        words = ["stage=report", "stage.models=[]", store, "data.length=256"]
        words += [f"stage.folder={out / 'page'}"]
        return [*words, "stage.outputs={table3:true,fig1:true,report:true}"], out / "page"
    if stage == "convert":
        _, words = request.getfixturevalue("checkpoint")
        return [*words, f"model.path={out / 'models/converted'}"], out / "models"
    import datasets  # noqa: F401  # once, and not in each child

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("the grass is green. " * 50)
    words = ["stage=tokenize", "corpus=local", f"corpus.path={tmp_path / 'texts'}"]
    words += [f"stage.init={tiny_models['ratplus']}", f"corpus.folder={out / 'corpus'}"]
    return words, out / "corpus"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize(
    "fault", ["eval", "hit_rate", "pretrain", "report", "tokenize", "convert"], indirect=True
)
def test_ended_at_any_file_operation_and_run_again(run, fault, number):
    """And once more, earlier, in the run that goes on."""
    words, folder = fault

    def ended(at):
        code, said = run(words, at, number)
        if number == signal.SIGINT and code == 130:
            assert said.splitlines()[-1] == "stopped; the same command resumes", said
            assert "Traceback" not in said and said.count("stopped") == 1, said
            drafts = [*folder.rglob("*.tmp"), *folder.rglob("*[!0-9].partial")]  # but for shards
            assert not drafts, at
        else:
            assert code in (0, -number), (at, said)
        return code != 0

    assert not ended(0)
    whole = content(folder)
    for step in count(1):
        shutil.rmtree(run.output)
        if not ended(step):
            break
        assert not (ended(step // 2) and ended(0))
        assert content(folder) == whole, step
    assert step >= 20


def test_sigterm_ends_a_training_with_a_checkpoint(run):
    code, said = run(training(), 30, signal.SIGTERM)
    folder = run.output / "training/pocket_attention_0"
    kept = [path.name for path in folder.glob("checkpoint-*")]
    assert code == 1 and kept, (code, said)
    assert "error: stopped by a signal after step" in said.splitlines()[-1]
    assert not (folder / "model").exists()


def test_sigkill_costs_and_repeats_no_example(run, tiny_models):
    words, store = evaluation(tiny_models), Store(run.output / "results")
    words += ["data.tasks=[S-1,MV]", "data.examples=5"]
    stored, at = 0, 20
    while not 0 < stored < 10:  # some examples
        shutil.rmtree(run.output, ignore_errors=True)
        assert run(words, at)[0] == -signal.SIGKILL
        stored, at = sum(len(cell.records()) for cell in store.cells()), at + 5
    assert run(words)[0] == 0
    cells = list(store.cells())
    assert [cell.done() for cell in cells] == [5, 5]
    for cell in cells:
        lines = (cell.path / "samples.jsonl").read_text().splitlines()
        ids = [json.loads(line)["id"] for line in lines]
        assert ids == [f"{cell.key['task']}/validation/0/{i}" for i in range(5)]


@pytest.mark.parametrize(
    "word", ["seed=-1", "model.path=nowhere", "data.essay=nowhere", "dry_run=true"]
)
def test_a_refused_job_and_a_dry_run_leave_no_folder(run, tiny_models, word):
    code, said = run([*evaluation(tiny_models), word, "hydra.run.dir=${output}/runs/day/job"])
    refused = said.splitlines()[-1].startswith("error: ")
    assert (code, refused) == ((0, False) if word == "dry_run=true" else (1, True)), said
    assert run.output.exists() and not (run.output / "runs").exists()


@pytest.mark.parametrize(
    ("word", "shows"), [("stage=eval", "Accuracy in %"), ("--help", "mean ? std")]
)
def test_a_terminal_of_ascii_gets_the_table(run, tiny_models, word, shows):
    code, said = run([*evaluation(tiny_models), word], encoding="ascii")
    assert code == 0 and shows in said, said
