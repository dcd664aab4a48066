"""The command: compose a configuration with Hydra, validate it, and run its stage.

`python run.py` in a checkout, `ratplus_exp` if the package is installed. Slow imports follow the
validation, which needs torch for the method's class alone.
"""

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ratplus_exp.config import CONF, validate

WAIT = 3.0  # seconds; torchrun polls its processes ten times a second


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        validate(cfg)
        from ratplus_exp.stages import run

        run(cfg)
        if cfg.dry_run:
            _remove_empty(cfg)
    except (ValueError, OSError, OmegaConfBaseException) as error:
        _remove_empty(cfg)
        fail(error)


def _remove_empty(cfg: DictConfig) -> None:
    """Remove the job's folder, and those above it in cfg.output that are then empty, if the job
    wrote nothing."""
    folder, output = Path(HydraConfig.get().runtime.output_dir), Path(str(cfg.output)).absolute()
    empty = folder != Path.cwd() and {x.name for x in folder.iterdir()} <= {".hydra", "run.log"}
    if empty and not any(log.stat().st_size for log in folder.glob("run.log")):
        shutil.rmtree(folder)
        with suppress(OSError):
            for above in folder.parents:
                if output in above.parents:
                    above.rmdir()


def fail(error: BaseException) -> None:
    """Exit with code 1 and a one-line message."""
    where = ""
    if (rank := os.environ.get("RANK", "0")) != "0":
        # Most errors occur on all ranks: rank 0 prints them, and torchrun or srun ends the others
        # while they wait. An error of one rank alone is printed by that rank.
        time.sleep(WAIT)
        where = f" on rank {rank}"
    sys.exit(f"error{where}: " + " ".join(message_of(error).split()))


def message_of(error: BaseException) -> str:
    """An error's message for users."""
    if missing := getattr(error, "missing_cfg_file", None):
        return _no_option(*str(missing).rpartition("/")[::2])
    if str(error).startswith("Config group override must be"):
        return "a group has no such option: use one of them by its name, as in method=quest"
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read {error.override!r}: write name=value, and quote a value with characters "
            "other than letters, digits and ._/-+: 'name=\"value\"'"
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no {error.filename}: check the path"
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or "a file"
        return f"cannot use {where} ({error.strerror}): for an output, set output=DIR"
    cause = error.__cause__
    if isinstance(parent := getattr(cause, "parent_node", None), DictConfig):
        where = str(parent._get_full_key("")) or "the configuration"
        known = ", ".join(str(name) for name in parent if name != "hydra")
        return f"{where}: there is no field {getattr(cause, 'key', '')!r}: use one of {known}"
    return f"{error}: {cause}" if cause and isinstance(error, HydraException) else str(error)


def _no_option(group: str, option: str) -> str:
    folder = CONF / group
    options = sorted(path.stem for path in folder.glob("*.yaml"))
    if "submitit" in option:
        return "SLURM launchers need a package: pip install -e '.[slurm]'"
    if not group or not options:
        return f"there is no configuration {group or option}: leave --config-name out"
    return f"there is no {group} {option}: choose one of {', '.join(options)}"


def command() -> None:
    """`main` as a command that prints users' errors in one line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise the exception instead of printing it
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may be ASCII
    if os.environ.get("RANK", "0") != "0":  # rank 0 writes the job's folder
        sys.argv += ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=disabled"]
    try:
        main()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
