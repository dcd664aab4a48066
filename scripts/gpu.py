"""The measurements that need a GPU: pieces with time limits, the most important ones first.

    python scripts/gpu.py               the pieces without a result, in order
    python scripts/gpu.py bench small   these pieces, with or without a result (trainings resume)
    DRY=1 python scripts/gpu.py         all pieces on a CPU, with tiny sizes

Environment: OUT, the folder for the results (outputs/gpu); COMMIT, the commit of this copy;
SMALL_SECONDS, the time limit of the small tier; SET, settings of its trainings; SEED, the seed of
the pocket training. Packages: the host's, and wheels/*.whl (`make gpu-wheels`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DRY = os.environ.get("DRY") == "1"
WORK = Path("outputs", "gpu_dry" if DRY else "gpu")  # below ROOT, where all commands run
OUT = Path(os.environ["OUT"]).absolute() if os.environ.get("OUT") else WORK
SMALL = float(os.environ.get("SMALL_SECONDS", 290))  # of the small pair
START = 20  # seconds of a training for its start and its end
LATE = 15  # more seconds for a slow start
GRACE = 12  # seconds from SIGTERM to SIGKILL: trainings write a checkpoint
ARCHIVE = 15 << 20  # bytes of a result at most; the limit of copied files is 16 MiB

# Patterns for rows of the bench: our kernels, their plans, baselines, kernels to profile.
OURS = r"B=1 (T=\d+ )?H=32 (K=32 )?[TD]=.* \| kernel$"
PLANS = r"memory.*: plans \| B=1 T=32768 H=32 |(Quest|MoBA).*: plans"
SCANS = r"memory scan, .*B=1 T=(4096|32768|131072) H=32 .*\| (associative|chunk_hgrn \()"
SPARSE = (
    r"SnapKV selection.*B=1 H=32 K=32 .*\| torch definition, compiled"
    r"|B=1 H=32 K=32 T=(4096 .*k=4|32768 .*k=32|131072 .*k=128) \| "
    r"(dense, SDPA (flash|cuDNN)|torch gather, compiled|FlexAttention)"
)
PROFILED = (
    r"(memory scan, (forward|backward) \| B=1 T=32768 H=32 |SnapKV .*B=1 H=32 K=32 T=32768 "
    r"|(Quest.*|MoBA.*correlated.*) B=1 H=32 K=32 T=32768 .*k=32).*\| kernel$"
)

Steps = Iterator[tuple[float, list[str]]]  # seconds since the piece began, commands side by side


class SkipPiece(Exception):
    """Something that a piece needs was not copied."""


def kernels(out: Path) -> Steps:
    """The kernels' tests; on a GPU the same ones take real shapes."""
    if DRY:  # the bench's dry run interprets the others
        file = "tests/kernels/test_memory_scan.py"
        yield 90, [f"{interpreted()} python -m pytest -v -k 'not gradients' {file}"]
    else:
        # On SIGINT pytest lists the failures so far.
        pytest = "timeout -s INT 70 python -m pytest -v -n 8 -m 'not slow' --timeout=60 -rf"
        yield 85, [f"{pytest} tests/kernels"]


def bench(out: Path) -> Steps:
    """Our kernels compared with their floors, then with other plans."""
    if DRY:
        yield 90, [measured(out, "scan sparse", "")]
        return
    yield 60, [measured(out, "scan sparse", OURS)]
    yield 140, [measured(out, "plans", PLANS)]


def baselines(out: Path) -> Steps:
    """The baselines of our kernels."""
    yield 45, [measured(out, "sparse", SPARSE)]
    yield 90, [measured(out, "scan", SCANS)]


def warm(out: Path) -> Steps:
    """Fill the compilers' caches for `bench`; runs in parallel with other pieces."""
    parts = {"sparse": OURS, "scan": OURS, "plans": PLANS}
    shorter = "^(?!.*T=131072).*({})".format
    yield 70, [measured(out / x, x, shorter(match), "--once") for x, match in parts.items()]


def profile(out: Path) -> Steps:
    """A profile of our kernels, by Nsight Compute."""
    sections = ("SpeedOfLight", "WarpStateStats", "Occupancy", "LaunchStats")
    ncu = (
        "ncu --clock-control none --profile-from-start off "
        f"{' '.join(f'--section {x}' for x in sections)} "
        f"--kernel-name 'regex:^(_|totals)' --log-file {shlex.quote(str(out))}/ncu.txt "
    )
    yield 45, [("" if DRY else ncu) + measured(out, "scan sparse", PROFILED, "--once")]


def measured(out: Path, parts: str, match: str, *more: str) -> str:
    """The command for parts of the bench."""
    command = f"python -m ratplus_bench --out {out}/bench --only {parts}"
    if DRY:
        return " ".join((interpreted(), command, *more, "--dry"))
    return " ".join((command, *more, "--match", shlex.quote(match)))


def pocket(out: Path) -> Steps:
    """A training of the pocket pair by its recipe, and Table 3 of the shipped one."""
    number = os.environ.get("SEED", "3")
    options = f"threads=1 stage.workers={0 if DRY else 2}"
    base, pretraining, tuning, table3 = "", "", "", "data.examples=25 pair.workers=4"
    if DRY:
        options += " stage.tokens_per_step=1024"
        base, table3 = "stage.drill_tokens=1024", "data.tasks=[S-1] data.examples=1 pair.workers=1"
        pretraining, tuning = "stage.schedule=[[1024,64],[1024,128]]", "stage.schedule=[[1024,512]]"

    def train(experiment: str, *settings: str, seed: str = number) -> str:
        return run(out, f"experiment={experiment}", *settings, f"{options} seed={seed}")

    table3 = run(out, "experiment=table3 pair=pocket", table3, f"stage.folder={out}/table3")
    yield 120, [train("pocket_base", pretraining, base), table3]
    pair = [
        (
            train(x, pretraining),
            train(f"{x}_sft", tuning),
            train(f"{x}_sft2", tuning),
            train(f"{x}_sft3", tuning, f"model.training={number}", seed=f"10{number}"),
        )
        for x in ("pocket_attention", "pocket_ratplus")
    ]
    yield 240, [" && ".join(phases) for phases in pair]


def small(out: Path) -> Steps:
    """The small pair by its recipe, each training cut to its time, then Tables 3 and 5."""
    began, models = time.monotonic(), ("small_attention", "small_ratplus")

    def train(name: str, workers: int, until: float) -> str:
        left = max(10, until - START - (time.monotonic() - began))
        settings = [f"stage.optimizer.seconds={left:.0f}", os.environ.get("SET", "")]
        if DRY:
            drill = "stage.drill_tokens=1024" if name == "small_base" else ""
            name = f"[{name},small_trial_training]"
            return run(out, f"experiment={name}", *settings, "stage.workers=0", drill)
        # Logged every 250th step, since most steps are left out; a checkpoint at the end alone.
        every = "stage.optimizer.log_every=250 stage.optimizer.checkpoint_every=1000000"
        return run(out, f"experiment={name}", *settings, every, f"stage.workers={workers}")

    # Shares of the time at whose end each of them is to be done; a slow start has LATE in addition.
    base, trained, tuned, tables = (share * SMALL for share in (0.28, 0.62, 0.8, 0.93))
    yield base + LATE, [train("small_base", 14, base)]
    yield trained + LATE, [train(model, 7, trained) for model in models]
    yield tuned + LATE, [train(f"{model}_sft", 7, tuned) for model in models]

    def without(*outputs: str) -> str:
        return " ".join(f"stage.outputs.{x}=false" for x in outputs)

    pair = f"pair=small {'data.examples=1' if DRY else 'data.examples=50 pair.random_examples=25'}"
    cells = (
        f"experiment=[table3,table5{',small_trial' * DRY}]",
        *(pair, "data.batch_size=25", f"pair.workers={1 if DRY else 5}"),
        without("table3", "table5"),
    )
    folders = {x: f"stage.folder={out}/cells/{x}" for x in models}
    yield tables, [run(out, *cells, f"pair.models=[{x}]", folders[x]) for x in models]
    report = f"stage=report {'experiment=small_trial' * DRY}"
    unwanted = without("table2", "fig1", "fig2", "fig3", "fig4", "report")
    yield SMALL, [run(out, report, pair, f"stage.folder={out}/report", unwanted)]


def smollm2(out: Path) -> Steps:
    """A training of pretrained weights with the memory, if the weights and a corpus were copied."""
    model, corpus = Path("outputs/models/smollm2_135m"), Path("outputs/corpus/local")
    parts = sorted(model.parent.glob("smollm2.gguf.*"))
    if not corpus.exists() or not (parts or model.exists()):
        raise SkipPiece(f"there is no {corpus}, or neither {model} nor a smollm2.gguf.* next to it")
    if not model.exists():
        file = out / "joined.gguf"
        convert = f"stage=convert stage.dtype=null model.path={model} checkpoint={file}"
        yield 40, [f"cat {' '.join(map(str, parts))} > {file} && {run(out, convert)}"]
    tokens = f"corpus.folder={corpus} stage.schedule=[[6000000,1024]]"
    low_rank = "stage.low_rank=8 stage.optimizer.lr=1.0e-3"  # a file of 11 MiB, which comes back
    yield 120, [run(out, "experiment=smollm2_ratplus", tokens, low_rank)]


PIECES = {x.__name__: x for x in (kernels, warm, bench, baselines, profile, pocket, small, smollm2)}
if DRY:
    del PIECES["baselines"]  # in bench


def run(out: Path, *settings: str) -> str:
    return f"python run.py {' '.join(filter(None, settings))} output={out} tracking=disabled"


def interpreted() -> str:
    """With NumPy 2.3 if it is installed (`make gpu-dry`): 2.5 breaks Triton's interpreter."""
    return f"TRITON_INTERPRET=1 PYTHONPATH={sys.prefix}/numpy2.3:$PYTHONPATH"


def main(arguments: list[str]) -> int:
    if arguments == ["prepare"]:  # before pieces that run side by side
        prepare()
        return 0
    if unknown := set(arguments) - PIECES.keys():
        sys.exit(f"no piece is called {', '.join(sorted(unknown))}: choose of {', '.join(PIECES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prepare()
    about, codes = describe(), [0]
    for name in arguments or PIECES:
        record = WORK / f"{name}.json"
        if not arguments and record.exists() and json.loads(record.read_text())["rc"] is not None:
            print(f"{name}: already exists")
            continue
        result = run_piece(name, PIECES[name], about)
        codes.append(result["rc"] or 0)
        took = f"{result['seconds']} s ({result['cpu_seconds']} of CPU)"
        print(f"{name}: rc {result['rc']} in {took} {result['note']}", flush=True)
    return max(codes)


def prepare() -> None:
    """Set the environment of all commands, and unpack the copied wheels."""
    os.chdir(ROOT)
    WORK.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(parents=True, exist_ok=True)
    site = ROOT / WORK / "site"
    for wheel in () if DRY or site.exists() else sorted(Path("wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:  # pip would stop at the first that it rejects
            file.extractall(site)
    folders = ROOT, ROOT / "kernels", ROOT / "kernels" / "bench", site
    os.environ.update(
        PYTHONPATH=os.pathsep.join(map(str, folders)),
        PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "1" if DRY else "4")


def describe() -> dict[str, Any]:
    """Device, versions, commit and date, found by a separate process."""
    code = "import json, ratplus_exp.provenance as p; print(json.dumps(p.provenance({})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-4000:]}
    about = json.loads(done.stdout.splitlines()[-1])
    return {key: about[key] for key in ("device", "versions", "commit", "date")}


def run_piece(name: str, steps: Callable[[Path], Steps], about: dict[str, Any]) -> dict[str, Any]:
    """Run a piece and write its record, even if the piece fails."""
    folder, started, used = WORK / name, time.monotonic(), sum(os.times()[2:4])
    folder.mkdir(parents=True, exist_ok=True)
    record = {"piece": name, "rc": 1, "note": "stopped from outside", "dry": DRY, **about}
    results: list[dict[str, Any]] = []
    try:
        for until, commands in steps(folder):
            results += side_by_side(commands, started + until * (10 if DRY else 1), folder)
        record |= {"rc": max((abs(x["rc"]) for x in results), default=0), "note": ""}
    except SkipPiece as reason:
        record |= {"rc": None, "note": f"not run: {reason}"}
    except Exception:
        record["note"] = traceback.format_exc()
    finally:
        record |= {"seconds": round(time.monotonic() - started, 1), "commands": results}
        record["cpu_seconds"] = round(sum(os.times()[2:4]) - used, 1)  # of commands
        record["date_end"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        pack(folder, record)
    return record


def side_by_side(commands: list[str], end: float, folder: Path) -> list[dict[str, Any]]:
    """Run commands until they end or time is up, and end all of their child processes."""
    begun, running = time.monotonic(), dict[Path, subprocess.Popen]()
    if begun >= end:
        return [{"command": x, "rc": 124, "output": "no time was left"} for x in commands]
    limit = ["timeout", f"--kill-after={GRACE}", f"{end - begun:.1f}", "bash", "-c"]
    wait = "trap : TERM; "  # for a training that writes its checkpoint
    try:
        for command in commands:
            path = folder / f"{len(list(folder.glob('*.log'))) + 1:02d}.log"
            command = command.replace("python ", f"{shlex.quote(sys.executable)} ")
            with path.open("wb") as log:
                running[path] = subprocess.Popen(
                    [*limit, wait + command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
        for process in running.values():
            process.wait()
    finally:
        for process in running.values():
            process.terminate()  # timeout passes the signal on
        for process in running.values():
            process.wait()
            with suppress(ProcessLookupError):  # no child is left
                os.killpg(process.pid, signal.SIGKILL)
    results, seconds = [], round(time.monotonic() - begun, 1)  # of all commands
    for command, (path, process) in zip(commands, running.items(), strict=True):
        text = re.sub(r"[^\n]*\r", "", path.read_bytes().decode(errors="replace"))  # progress bars
        rc, text = process.returncode, text.replace(f"{ROOT}/", "")
        output = text[-6000 if rc else -1500 :]
        results.append({"command": command, "rc": rc, "seconds": seconds, "output": output})
    return results


def pack(folder: Path, record: dict[str, Any]) -> None:
    """Write the record, and an archive with it and the piece's files: smallest first while there is
    room, without checkpoints and models before their fine-tuning."""
    files = sorted((x.stat().st_size, x) for x in folder.rglob("*") if x.is_file())
    room, left_out, path = ARCHIVE, [], WORK / f"{record['piece']}.json"
    with tarfile.open(path.with_suffix(".tgz"), "w:gz") as archive:
        for size, file in files:
            if "checkpoint-" in str(file) or ("model" in file.parts and "_sft" not in str(file)):
                continue
            # Text shrinks to a quarter.
            room -= size // (1 if file.suffix in (".safetensors", ".png", ".pdf") else 4)
            if room < 0:
                left_out.append(str(file.relative_to(WORK)))
            else:
                archive.add(file, file.relative_to(WORK))
        path.write_text(json.dumps(record | {"left_out": left_out}, indent=1) + "\n")
        archive.add(path, path.name)
    if OUT != WORK:
        shutil.copy(path.with_suffix(".tgz"), OUT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
