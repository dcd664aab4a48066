"""What only a GPU can show, in a quarter of an hour: pieces in order of worth, each within a limit.

    python scripts/gpu.py               the pieces that have no result yet, in order
    python scripts/gpu.py bench small   these, again where they have one (trainings go on)
    DRY=1 python scripts/gpu.py         all of it in miniature, on a CPU

From the environment: OUT, the folder whose files come back (outputs/gpu); COMMIT, of a copy without
.git; SET, further settings of the small tier's trainings. Needs Python's standard library alone;
packages come from the host, or as wheels/*.whl (`make gpu-wheels`). See docs/small-tier.md.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DRY = os.environ.get("DRY") == "1"
WORK = Path("outputs", "gpu_dry" if DRY else "gpu")  # below ROOT, where all commands run
OUT = Path(os.environ["OUT"]).absolute() if os.environ.get("OUT") else WORK
SLOWER = 10 if DRY else 1  # that a CPU may be
GRACE = 12.0  # seconds from SIGTERM to SIGKILL: trainings write a checkpoint
ARCHIVE = 15 << 20  # bytes of a result at most; a file that comes back may have 16 MiB
PATHS = [ROOT, ROOT / "kernels", ROOT / "kernels" / "bench"]
# NumPy 2.5 breaks Triton's interpreter itself, so what is interpreted runs with NumPy 2.3.
OLD_NUMPY = Path(sys.prefix) / "numpy2.3"

Steps = Iterator[tuple[float, list[str]]]  # seconds since the piece began, commands side by side


class NotRun(Exception):
    """Something that a piece needs was not carried."""


# ---- the pieces: what runs side by side, and until when ----


def kernels(out: Path) -> Steps:
    """The kernels' tests; on a GPU the same ones take real shapes."""
    if DRY:
        # The bench's dry run takes all kernels through the interpreter.
        file = "tests/kernels/test_memory_scan_triton.py"
        yield 90, [f"{interpreted()} python -m pytest -v -n 2 {file}"]
    else:
        files = "tests/kernels tests/models/test_decoding.py"
        yield 90, [f"python -m pytest -v -n 8 -m 'not slow' --timeout=80 {files}"]


def bench(out: Path) -> Steps:
    """Kernels beside their floors first, then beside what else there is."""
    measure = f"python -m ratplus_bench --out {out}/bench --only"
    if DRY:
        yield 90, [f"{interpreted()} {measure} scan sparse --dry"]
        return
    ours = r"B=1 (T=\d+ )?H=32 (K=32 )?[TD]=.* \| (kernel$|dense, SDPA flash)"
    scans = r"memory scan, .*B=1 T=(4096|32768|131072) H=32 .*\| (kernel|associative|chunk_hgrn \()"
    sizes = r"B=1 H=32 K=32 T=(4096 .*k=4|32768 .*k=32|131072 .*k=128) \| "
    forms = r"(kernel|dense, SDPA (flash|cuDNN)|torch gather, compiled|FlexAttention)"
    yield 75, [f"{measure} scan sparse --match {shlex.quote(ours)}"]
    yield 112, [f"{measure} scan --match {shlex.quote(scans)}"]
    yield 150, [f"{measure} sparse --match {shlex.quote(sizes + forms)}"]


def pocket(out: Path) -> Steps:
    """One training of the pocket pair, and its Table 3."""
    yield from trained_pairs(out, 0)


def pocket_seeds(out: Path) -> Steps:
    """Two more trainings of both, and their Table 3."""
    if DRY:
        raise NotRun("a dry run trains one pair, to take three minutes at most")
    yield from trained_pairs(out, 1, 2)


def trained_pairs(out: Path, *seeds: int) -> Steps:
    models = ("pocket1024_attention", "pocket1024_ratplus")
    first = "stage.schedule=[[1024,64],[1024,128]]" if DRY else ""
    tuned = "stage.schedule=[[1024,512]]" if DRY else ""
    tiny = "stage.tokens_per_step=1024" if DRY else ""
    rest = f"threads=1 stage.workers={0 if DRY else 2} {tiny} {shared(out)}"
    drills = "stage.drill_tokens=1024" if DRY else ""
    base = "experiment=pocket1024_base"
    yield 30, [run(f"{base} seed={seed}", first, drills, rest) for seed in seeds]
    trainings = [
        run(f"experiment={model} seed={seed}", first, rest)
        + " && "
        + run(f"experiment={model}_sft seed={seed}", tuned, rest)
        for seed in seeds
        for model in models
    ]
    yield 80, trainings
    table3 = run(
        f"experiment=table3 model={models[1]} data=pocket1024 pair.name=pocket1024",
        f"pair.models=[{','.join(models)}] pair.trainings=[{','.join(map(str, seeds))}]",
        "data.tasks=[S-1] data.examples=1" if DRY else "data.examples=100",
        f"pair.workers={1 if DRY else 8} stage.folder={out}/table3 {shared(out)}",
    )
    yield 90, [table3]


def small(out: Path) -> Steps:
    """The small pair on as many tokens as there is time for, then Tables 3 and 5."""
    models = {"small_attention": 2, "small_ratplus": 1}  # and how often its share of the tokens
    settings = f"tracking=disabled {os.environ.get('SET', '')}"
    look = "stage.drill_tokens=0" + ("" if DRY else " stage.optimizer.log_every=5")
    step = 1024 if DRY else 65_536
    lengths = (480, 512) if DRY else (256, 4096)
    phases = [[(2 if DRY else 10) * step, length] for length in lengths]
    look = f"{look} {schedule(phases)} {settings} output={out}/look"
    yield 45, [run(trial(model, "training"), look) for model in models]
    began = time.monotonic()
    rates = {m: speeds(out / "look" / "training" / m / "log.jsonl") for m in models}
    tokens = 4 * step if DRY else tokens_of(rates, models, seconds=75)
    (out / "tokens.json").write_text(json.dumps({"rates": rates, "tokens": tokens}) + "\n")
    trainings = []
    for model, share in models.items():
        n = int(tokens * share)
        phases = [[int(n * part), length] for length, part in small_phases()]
        drills = f"stage.drill_tokens={n * 2 // 15}"
        tuned = schedule([[max(2 * step, int(tokens * 4 / 15)), lengths[1]]])
        rest = f"{settings} output={out}"
        trainings.append(
            run(trial(model, "training"), schedule(phases), drills, rest)
            + " && "
            + run(trial("small_sft", "training"), f"model={model}", tuned, rest)
        )
    yield 165, trainings
    examples = "pair.workers=1" if DRY else "data.examples=100 pair.random_examples=25"
    rest = f"pair=small {examples} {shared(out)}"
    yield 205, [run(trial("table3"), rest, f"stage.folder={out}/table3")]
    yield 228, [run(trial("table5"), rest, f"stage.folder={out}/table5")]
    if not DRY and time.monotonic() - began > 150:  # a table was cut short: what there is of it
        yield 240, [run("stage=report", rest, f"stage.folder={out}/report")]


def small_phases() -> list[tuple[int, float]]:
    """Lengths, and their shares of the tokens in conf/experiment/small_ratplus.yaml."""
    return [(512, 1.0)] if DRY else [(256, 3 / 15), (1024, 2 / 15), (2048, 3 / 15), (4096, 7 / 15)]


def tokens_of(rates: dict[str, dict[int, float]], shares: dict[str, int], seconds: float) -> int:
    """Tokens of RAT+'s schedule that, with fine-tuning, take so many seconds side by side."""
    slowest = 0.0  # seconds a token
    for model, share in shares.items():
        short, long = (rates[model].get(length, 5e5) for length in (256, 4096))
        dense = sum(part / (short if length < 1024 else long) for length, part in small_phases())
        slowest = max(slowest, share * dense + 4 / 15 / long)
    return int(min(seconds / slowest, 300e6))


def speeds(log: Path) -> dict[int, float]:
    """Tokens a second by length, from a training's last row at each; none without a log."""
    rows = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    return {row["length"]: row["tokens_per_second"] for row in rows}


def smollm2(out: Path) -> Steps:
    """Pretrained weights with the memory added, where they and their text were carried."""
    corpus = "outputs/corpus/local"
    for needed in ("conf/experiment/smollm2_ratplus.yaml", "outputs/models/smollm2_135m", corpus):
        if not Path(needed).exists():
            raise NotRun(f"there is no {needed}")
    tokens = "stage.schedule=[[6000000,1024]]"
    yield 120, [run(f"experiment=smollm2_ratplus corpus.folder={corpus}", tokens, shared(out))]


PIECES: dict[str, Callable[[Path], Steps]] = {
    f.__name__: f for f in (kernels, bench, pocket, pocket_seeds, small, smollm2)
}


def run(*settings: str) -> str:
    return f"python run.py {' '.join(filter(None, settings))}"


def shared(out: Path) -> str:
    return f"output={out} tracking=disabled"


def schedule(phases: list[list[int]]) -> str:
    return f"stage.schedule={json.dumps(phases, separators=(',', ':'))}"


def trial(experiment: str, kind: str = "") -> str:
    small_trial = "small_trial" + ("_training" if kind else "")
    return f"experiment={f'[{experiment},{small_trial}]' if DRY else experiment}"


def interpreted() -> str:
    return f"TRITON_INTERPRET=1 PYTHONPATH={OLD_NUMPY}:$PYTHONPATH"


# ---- the runner ----


def main(arguments: list[str]) -> int:
    if unknown := set(arguments) - PIECES.keys():
        sys.exit(f"no piece is called {', '.join(sorted(unknown))}: choose of {', '.join(PIECES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prepare()
    about = describe()
    codes = []
    for name in arguments or PIECES:
        record = WORK / f"{name}.json"
        if not arguments and record.exists() and json.loads(record.read_text())["rc"] is not None:
            print(f"{name}: there already")
            continue
        result = run_piece(name, PIECES[name], about)
        codes.append(result["rc"] or 0)
        print(f"{name}: rc {result['rc']} in {result['seconds']} s {result['note']}", flush=True)
    return max(codes, default=0)


def prepare() -> None:
    """The environment of all commands, with the carried wheels."""
    os.chdir(ROOT)
    WORK.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(parents=True, exist_ok=True)
    site = ROOT / WORK / "site"
    for wheel in () if DRY else sorted(Path("wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:  # pip would stop at the first that it rejects
            file.extractall(site)
    os.environ.update(
        PYTHONPATH=os.pathsep.join(map(str, (*PATHS, site))),
        PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "1" if DRY else "4")


def describe() -> dict[str, Any]:
    """Device, versions, commit and date, found by a process of its own."""
    code = "import json, ratplus_exp.provenance as p; print(json.dumps(p.provenance({})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-4000:]}
    about = json.loads(done.stdout.splitlines()[-1])
    return {key: about[key] for key in ("device", "versions", "commit", "date")}


def run_piece(name: str, steps: Callable[[Path], Steps], about: dict[str, Any]) -> dict[str, Any]:
    """Run a piece and write its record, whatever becomes of it."""
    folder, started = WORK / name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"piece": name, "rc": 1, "note": "", "dry": DRY, **about}
    done: list[dict[str, Any]] = []
    try:
        for until, commands in steps(folder):
            done += side_by_side(commands, started + until * SLOWER, folder)
        record["rc"] = max((abs(x["rc"]) for x in done), default=0)
    except NotRun as reason:
        record |= {"rc": None, "note": f"not run: {reason}"}
    except Exception:
        record["note"] = traceback.format_exc()
    except SystemExit:
        record["note"] = "stopped from outside"
        raise
    finally:
        record |= {"seconds": round(time.monotonic() - started, 1), "commands": done}
        record["date_end"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        pack(folder, record)
    return record


def side_by_side(commands: list[str], end: float, folder: Path) -> list[dict[str, Any]]:
    """Run commands until they end or time is up; none of their children outlives them."""
    running: list[tuple[dict[str, Any], subprocess.Popen, Path, float]] = []
    begun = time.monotonic()
    if begun >= end:
        return [{"command": x, "rc": 124, "output": "no time was left"} for x in commands]
    try:
        for command in commands:
            path = folder / f"{len(list(folder.glob('*.log'))) + 1:02d}.log"
            with path.open("wb") as log:
                process = subprocess.Popen(
                    ["bash", "-c", command.replace("python ", f"{shlex.quote(sys.executable)} ")],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            entry = {"command": command, "rc": None, "stopped": False}
            running.append((entry, process, path, begun))
        while time.monotonic() < end and any(p.poll() is None for _, p, *_ in running):
            time.sleep(0.1)
            note_ends(running, begun)
        for entry, process, *_ in running:
            entry["stopped"] = process.poll() is None
    finally:
        signal_all((p for _, p, *_ in running), signal.SIGTERM)
        limit = time.monotonic() + GRACE
        while time.monotonic() < limit and any(alive(p) for _, p, *_ in running):
            time.sleep(0.1)
        signal_all((p for _, p, *_ in running), signal.SIGKILL)
        for _, process, *_ in running:
            process.wait()
        note_ends(running, begun)
    for entry, _, path, _ in running:
        text = re.sub(r"[^\n]*\r", "", path.read_bytes().decode(errors="replace"))  # progress bars
        text = text.replace(f"{ROOT}/", "")
        entry["output"] = text[-6000 if entry["rc"] else -1500 :]
    return [entry for entry, *_ in running]


def note_ends(running: Iterable[tuple], begun: float) -> None:
    for entry, process, *_ in running:
        if entry["rc"] is None and process.poll() is not None:
            entry |= {"rc": process.poll(), "seconds": round(time.monotonic() - begun, 1)}


def alive(process: subprocess.Popen) -> bool:
    """Whether the process or a child of it is there."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def signal_all(processes: Iterable[subprocess.Popen], number: int) -> None:
    for process in processes:
        if alive(process):
            os.killpg(process.pid, number)


def pack(folder: Path, record: dict[str, Any]) -> None:
    """The record, and an archive of it and the piece's files: the small ones first, as far as they
    fit, no checkpoints and no model that is still to be fine-tuned."""
    files = [
        path for path in folder.rglob("*")
        if path.is_file() and "checkpoint-" not in str(path) and path.stat().st_size < ARCHIVE
    ]  # fmt: skip
    files = [x for x in files if "model" not in x.parts or "_sft" in str(x)]
    total, left_out = 0, []
    path = WORK / f"{record['piece']}.json"
    with tarfile.open(WORK / f"{record['piece']}.tgz", "w:gz") as archive:
        for file in sorted(files, key=lambda x: x.stat().st_size):
            name = str(file.relative_to(WORK))
            packed = file.suffix in (".safetensors", ".png", ".pdf")
            total += file.stat().st_size // (1 if packed else 4)
            if total > ARCHIVE:
                left_out.append(name)
            else:
                archive.add(file, name)
        path.write_text(json.dumps(record | {"left_out": left_out}, indent=1) + "\n")
        archive.add(path, path.name)
    if OUT != WORK:
        shutil.copy(WORK / f"{record['piece']}.tgz", OUT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
