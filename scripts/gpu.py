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

# Rows of the bench: our kernels, ways to cut them, what to compare them with, what to profile.
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
        files = "tests/kernels"
        # SIGINT: pytest then writes what failed so far.
        run_them = "timeout -s INT 70 python -m pytest -v -n 8 -m 'not slow' --timeout=60"
        yield 85, [f"{run_them} -rf {files}"]


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
    short = "^(?!.*T=131072).*({})".format
    yield 70, [measured(out / x, x, short(match), "--once") for x, match in parts.items()]


def profile(out: Path) -> Steps:
    """A profile of our kernels, by Nsight Compute."""
    sections = ("SpeedOfLight", "WarpStateStats", "Occupancy", "LaunchStats")
    flags = " ".join(f"--section {x}" for x in sections)
    flags = f"{flags} --kernel-name regex:^(_|totals) --log-file {out}/ncu.txt"
    ncu = f"ncu --clock-control none --profile-from-start off {shlex.join(flags.split())} "
    yield 45, [("" if DRY else ncu) + measured(out, "scan sparse", PROFILED, "--once")]


def measured(out: Path, parts: str, match: str, *more: str) -> str:
    """A part of the bench."""
    which = ["--dry"] if DRY else ["--match", shlex.quote(match)]
    command = f"python -m ratplus_bench --out {out}/bench --only {parts}"
    return " ".join([interpreted()] * DRY + [command, *more, *which])


def pocket(out: Path) -> Steps:
    """A training of the pocket pair by its recipe, and Table 3 of the shipped one."""
    rest = f"threads=1 stage.workers={0 if DRY else 2} seed={os.environ.get('SEED', 3)}"
    base, more, tuned, examples = "", "", "", "data.examples=25"
    if DRY:
        rest = f"{rest} stage.tokens_per_step=1024"
        more, tuned = schedule([1024, 64], [1024, 128]), schedule([1024, 512])
        base, examples = f"{more} stage.drill_tokens=1024", "data.tasks=[S-1] data.examples=1"
    workers = f"pair.workers={1 if DRY else 4}"
    table3 = f"experiment=table3 pair=pocket {examples} {workers}"
    table3 = run(out, table3, f"stage.folder={out}/table3")

    def trainings(phases: dict[str, str]) -> str:
        return " && ".join(run(out, f"experiment={x}", size, rest) for x, size in phases.items())

    yield 120, [trainings({"pocket_base": base}), table3]
    models = ("pocket_attention", "pocket_ratplus")
    yield 240, [trainings({x: more, f"{x}_sft": tuned, f"{x}_sft2": tuned}) for x in models]


def small(out: Path) -> Steps:
    """The small pair by its recipe, each training cut to its time, then Tables 3 and 5."""
    began, models = time.monotonic(), ("small_attention", "small_ratplus")

    def training(name: str, workers: int, until: float) -> str:
        left = max(10, until - START - (time.monotonic() - began))
        more = f"stage.optimizer.seconds={left:.0f} {os.environ.get('SET', '')}"
        if DRY:
            more = f"{more} stage.workers=0 {'stage.drill_tokens=1024' * name.endswith('base')}"
        else:  # every 250th step, of which most are left out; a checkpoint at the end alone
            every = "stage.optimizer.log_every=250 stage.optimizer.checkpoint_every=1000000"
            more = f"{more} {every} stage.workers={workers}"
        experiment = f"experiment=[{name},small_trial_training]" if DRY else f"experiment={name}"
        return run(out, experiment, more)

    # Shares of the time at whose end each of them is to be done; a slow start has LATE in addition.
    base, trained, tuned, tables = (share * SMALL for share in (0.28, 0.62, 0.8, 0.93))
    yield base + LATE, [training("small_base", 14, base)]
    yield trained + LATE, [training(model, 7, trained) for model in models]
    yield tuned + LATE, [training(f"{model}_sft", 7, tuned) for model in models]
    rest = f"pair=small {'data.examples=1' if DRY else 'data.examples=50 pair.random_examples=25'}"
    cells = f"experiment=[table3,table5{',small_trial' * DRY}] {rest} stage.batch_size=25"
    cells = f"{cells} pair.workers={1 if DRY else 5}"
    cells = f"{cells} stage.outputs.table3=false stage.outputs.table5=false"
    ours = [f"{cells} pair.models=[{x}] stage.folder={out}/cells/{x}" for x in models]
    yield tables, [run(out, x) for x in ours]
    rest = f"stage=report {'experiment=small_trial ' * DRY}{rest} stage.folder={out}/report"
    unwanted = ("table2", "fig1", "fig2", "fig3", "fig4", "report")
    yield SMALL, [run(out, rest, *(f"stage.outputs.{x}=false" for x in unwanted))]


def smollm2(out: Path) -> Steps:
    """A training of pretrained weights with the memory, if weights (or their parts) and a corpus
    were copied."""
    model, corpus = Path("outputs/models/smollm2_135m"), Path("outputs/corpus/local")
    parts = sorted(model.parent.glob("smollm2.gguf.*"))
    if not corpus.exists() or not (parts or model.exists()):
        raise SkipPiece(f"there is no {corpus}, or neither {model} nor a smollm2.gguf.* next to it")
    if not model.exists():
        file = out / "joined.gguf"
        convert = f"stage=convert stage.dtype=null model.path={model} checkpoint={file}"
        yield 40, [f"cat {' '.join(map(str, parts))} > {file} && {run(out, convert)}"]
    tokens = f"corpus.folder={corpus} stage.schedule=[[6000000,1024]]"
    few = "stage.low_rank=8 stage.optimizer.lr=1.0e-3"  # a file of 11 MiB, which comes back
    yield 120, [run(out, "experiment=smollm2_ratplus", tokens, few)]


PIECES: dict[str, Callable[[Path], Steps]] = {
    "kernels": kernels,
    "warm": warm,
    "bench": bench,
    "baselines": baselines,
    "profile": profile,
    "pocket": pocket,
    "small": small,
    "smollm2": smollm2,
}
if DRY:
    del PIECES["baselines"]  # in bench


def run(out: Path, *settings: str) -> str:
    return f"python run.py {' '.join(filter(None, settings))} output={out} tracking=disabled"


def schedule(*phases: list[int]) -> str:
    return f"stage.schedule={json.dumps(phases, separators=(',', ':'))}"


def interpreted() -> str:
    """With NumPy 2.3 if it is installed (`make gpu-dry`): 2.5 breaks Triton's interpreter."""
    return f"TRITON_INTERPRET=1 PYTHONPATH={sys.prefix}/numpy2.3:$PYTHONPATH"


def main(arguments: list[str]) -> int:
    if arguments == ["prepare"]:  # before pieces that run side by side
        return prepare() or 0
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
    """The environment of all commands, with the copied wheels."""
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
    done: list[dict[str, Any]] = []
    try:
        for until, commands in steps(folder):
            done += side_by_side(commands, started + until * (10 if DRY else 1), folder)
        record |= {"rc": max((abs(x["rc"]) for x in done), default=0), "note": ""}
    except SkipPiece as reason:
        record |= {"rc": None, "note": f"not run: {reason}"}
    except Exception:
        record["note"] = traceback.format_exc()
    finally:
        record |= {"seconds": round(time.monotonic() - started, 1), "commands": done}
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
            process.terminate()  # timeout hands it on
        for process in running.values():
            process.wait()
            with suppress(ProcessLookupError):  # no child is left
                os.killpg(process.pid, signal.SIGKILL)
    done, seconds = [], round(time.monotonic() - begun, 1)  # of all
    for command, (path, process) in zip(commands, running.items(), strict=True):
        text = re.sub(r"[^\n]*\r", "", path.read_bytes().decode(errors="replace"))  # progress bars
        rc, text = process.returncode, text.replace(f"{ROOT}/", "")
        output = text[-6000 if rc else -1500 :]
        done.append({"command": command, "rc": rc, "seconds": seconds, "output": output})
    return done


def pack(folder: Path, record: dict[str, Any]) -> None:
    """Write the record, and an archive with it and the piece's files: smallest first while there is
    room, without checkpoints and models before their fine-tuning."""
    sizes = {x: x.stat().st_size for x in folder.rglob("*") if x.is_file()}
    room, left_out, path = ARCHIVE, [], WORK / f"{record['piece']}.json"
    with tarfile.open(path.with_suffix(".tgz"), "w:gz") as archive:
        for file in sorted(sizes, key=sizes.__getitem__):
            if "checkpoint-" in str(file) or ("model" in file.parts and "_sft" not in str(file)):
                continue
            # Text shrinks to a quarter.
            room -= sizes[file] // (1 if file.suffix in (".safetensors", ".png", ".pdf") else 4)
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
