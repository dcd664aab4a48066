"""Copy the results of scripts/gpu.py to outputs/reference, and their tables into the docs.

    python scripts/gpu_collect.py FOLDER   the archives of a GPU, then the tables
    python scripts/gpu_collect.py          the tables alone

docs/kernels.md and docs/small-tier.md have the tables between two marks.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from ratplus_bench import report

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = Path("outputs", "reference")
MARKS = "<!-- measured on a GPU: scripts/gpu_collect.py -->", "<!-- end of the measurements -->"

# Of each piece: the folder in REFERENCE of its record, and of which of its files.
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "kernels": ("bench", ()),
    "bench": ("bench", ()),
    "baselines": ("bench", ()),
    "profile": ("bench", ("ncu.txt",)),
    "pocket": (
        "pocket",
        ("table3/cells.csv", "table3/table3.md", "table3/provenance.json", "training/*/*.json*"),
    ),
    "small": ("small", ("report/*", "training/*/*.json*")),
    "smollm2": (
        "smollm2",
        ("training/*/*.json*", "training/*/trained.safetensors", "reports/*/*"),
    ),
}

# The aims of the kernels, of which docs/kernels.md has its table: suite, shape, the form that is
# measured, what by, and the aim.
SHAPE, SPARSE = "B=1 T={} H=32 D=128", "B=1 H=32 K=32 T={} D=128"
DENSE = "dense, SDPA cuDNN", "kernel", 1
AIMS = [
    *(
        (f"memory scan, {way}", SHAPE.format(length), "kernel", "floor", aim)
        for way, aim in (("forward", 1.5), ("backward", 1.7))
        for length in (32_768, 131_072)
    ),
    ("memory scan, forward", SHAPE.format(32_768), "associative_scan, compiled (P2)", "kernel", 10),
    ("memory scan, forward", SHAPE.format(32_768), "chunk_hgrn (fla-core)", "kernel", 1),
    ("Quest decode step", SPARSE.format(131_072) + " k=128", "kernel", "floor", 1.4),
    *(
        ("MoBA prefill, random queries", f"{SPARSE.format(n)} k={n // 1024}", *DENSE)
        for n in (32_768, 131_072)
    ),
    # 55 % of the matrix peak.
    ("MoBA prefill, random queries", f"{SPARSE.format(32_768)} k=32", "kernel", "floor", 1.8),
    *(
        (f"SnapKV {part}", f"{SPARSE.format(131_072)} window=64 kept=8192", "kernel", "floor", 1.4)
        for part in ("scores", "gather", "selection, all of it")
    ),
]


def main(arguments: list[str]) -> None:
    for folder in map(Path, arguments):
        archives = sorted(folder.glob("*.tgz"))
        if not archives:
            sys.exit(f"{folder} has no archive of scripts/gpu.py: name the folder that came back")
        for archive in archives:
            print(f"{archive.name}: {install(archive, ROOT)}")
    for page, text in tables(ROOT).items():
        path = ROOT / page
        path.write_text(between_marks(path.read_text(), text))


def install(archive: Path, root: Path) -> str:
    """Unpack a piece's archive into outputs/gpu, where the next run finds it, and copy the files of
    PLACES; returns a description."""
    unpacked = root / "outputs" / "gpu"
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    record = json.loads((unpacked / f"{archive.stem}.json").read_text())
    kind, patterns = PLACES.get(archive.stem, ("", ()))
    if record["rc"] is None or record.get("dry") or "device" not in record or not kind:
        reason = record["note"] or "a dry run, on an unknown device, or nothing to keep"
        return f"not copied: {reason}"
    target = root / REFERENCE / kind / report.slug(record["device"])
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{archive.stem}.record.json").write_text(json.dumps(record, indent=1) + "\n")
    source = unpacked / archive.stem
    for path in (p for pattern in patterns for p in source.glob(pattern) if p.is_file()):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    measured = source / "bench" / "bench.json"
    if measured.exists() and archive.stem in ("bench", "baselines"):
        about = json.loads(measured.read_text())["runs"][-1]["about"]
        runs = [*report.read(target, about), *report.read(source / "bench", about)]
        report.write(target, sorted(runs, key=lambda run: run.about["date"]))
    return f"rc {record['rc']}, copied to {target.relative_to(root)}"


def tables(root: Path) -> dict[str, str]:
    """The text of each page: results, and which ones are missing."""
    reference = root / REFERENCE
    benches = [
        path
        for path in sorted(reference.glob("bench/*/bench.json"))
        if not path.parent.name.endswith("-cpu")
    ]
    kernels = [summary(path) for path in sorted(reference.glob("bench/*/kernels.record.json"))]
    kernels = kernels or ["Missing: the kernels' tests on a GPU."]
    for path in benches:
        runs = json.loads(path.read_text())["runs"]
        kernels += [rates(path.parent.name, runs[-1]["about"]), aims(runs)]
    small = [summary(path) for path in sorted(reference.glob("small/*/small.record.json"))]
    for table in ("table3", "table5"):
        paths = sorted(reference.glob(f"small/*/report/{table}.md"))
        missing = [f"Missing: {table.capitalize()[:-1]} {table[-1]} on a GPU."]
        small += [path.read_text().strip() for path in paths] or missing
    return {
        "docs/kernels.md": "\n\n".join(kernels if benches else [*kernels, aims([])]),
        "docs/small-tier.md": "\n\n".join(small),
    }


def summary(path: Path) -> str:
    """A one-sentence summary of a record."""
    record = json.loads(path.read_text())
    versions = record["versions"]
    last = record["commands"][-1]["output"] if record["commands"] else "stopped from outside"
    tail = last.strip().splitlines()[-1:] or [""]
    return (
        f"{record['piece']}, {record['date'][:10]}, {record['device']}, torch {versions['torch']}, "
        f"commit {str(record['commit'])[:12]}: exit code {record['rc']} after "
        f"{record['seconds']:.0f} s; `{tail[0].strip(' =')}`."
    )


def rates(device: str, about: dict[str, Any]) -> str:
    """The rates from which a device's floors are computed."""
    return (
        f"{about['device']}, {about['date'][:10]}, commit {str(about['commit'])[:12]}: device copy "
        f"{about['copy_bytes_per_second'] / 1e12:.2f} TB/s, matrix product ({about['dtype']}) "
        f"{about['matmul_flop_per_second'] / 1e12:.0f} TFLOP/s. All rows: "
        f"`outputs/reference/bench/{device}/bench.md`."
    )


def aims(runs: list[dict[str, Any]]) -> str:
    """A table of AIMS with the measured figures, by the default plan and by the fastest."""
    rows = {(row["suite"], row["case"], row["form"]): row for run in runs for row in run["rows"]}
    timed = {key: row for key, row in rows.items() if row["seconds"]}
    fastest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(timed.values(), key=lambda row: row["seconds"], reverse=True):
        if row["suite"].endswith(report.PLANS):
            fastest[row["suite"].removesuffix(report.PLANS), row["case"]] = row
    lines = ["| suite | case | figure | aim | measured | fastest plan |", f"|{'---|' * 6}"]
    for suite, case, form, by, aim in AIMS:
        row = rows.get((suite, case, form), {"seconds": None, "note": ""})
        results = []
        for kernel in (timed.get((suite, case, "kernel")), fastest.get((suite, case))):
            value, met = None, False
            if kernel and by == "floor":
                value = kernel["seconds"] / kernel["floor"]
                met = value <= aim
            elif kernel and row["seconds"]:
                value = row["seconds"] / kernel["seconds"]
                met = value >= aim
            results.append(f"{value:.2f}{'' if met else ' (missed)'}" if value else "")
        measured = results[0] or row["note"] or "missing"
        text, sign = f"{form}, time / {by}", "≤" if by == "floor" else "≥"
        lines.append(f"| {suite} | {case} | {text} | {sign} {aim} | {measured} | {results[1]} |")
    return "\n".join(lines)


def between_marks(page: str, text: str) -> str:
    """The page with the text between its marks; AssertionError where it has none."""
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[-1]
    assert all(page.count(mark) == 1 for mark in MARKS), "the page lacks its marks"
    return f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}"


if __name__ == "__main__":
    main(sys.argv[1:])
