"""The command: compose a configuration with Hydra and hand it to its stage.

`python run.py` in a checkout, `ratplus_exp` where the package is installed.
"""

import os
import sys
import time
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ratplus_exp.stages import UserError, run

CONF = Path(__file__).parent / "conf"  # a link to the checkout's conf/; in a wheel, a copy
WAIT = 3.0  # seconds; torchrun looks after its processes ten times a second


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        run(cfg)
    except (*UserError, OmegaConfBaseException) as error:
        fail(error)


def fail(error: BaseException) -> None:
    """One line that says what is wrong and what to do, and an exit code that is not zero."""
    message = str(error)
    if missing := getattr(error, "missing_cfg_file", None):
        group, _, option = str(missing).partition("/")
        folder = CONF / group
        options = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
        message = f"there is no {group} {option}: choose one of {', '.join(options)}"
        if "submitit" in option:
            message = "SLURM launchers need a package: pip install -e '.[slurm]'"
        if group == "budget":
            message += "; or set budget.fraction, for instance budget.fraction=3/4"
    elif isinstance(error, FileNotFoundError) and error.filename:
        message = f"there is no {error.filename}: check the path"
    elif isinstance(error, OSError) and error.filename:
        message = f"cannot use {error.filename} ({error.strerror}): for an output, set output=DIR"
    elif error.__cause__ is not None:
        message = f"{message}: {error.__cause__}"
    where = ""
    if (rank := os.environ.get("RANK", "0")) != "0":
        # Most errors are every process's. The first then says it, and torchrun or srun ends the
        # others while they wait; what is wrong with one of them alone is said by that one.
        time.sleep(WAIT)
        where = f" on rank {rank}"
    sys.exit(f"error{where}: " + " ".join(message.split()))


def command() -> None:
    """`main` on the command line, every error of a user in one line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand us the exception, not a page about it
    if os.environ.get("RANK", "0") != "0":  # the job's folder is the first process's
        sys.argv += ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=disabled"]
    try:
        main()
    except (*UserError, HydraException, OmegaConfBaseException) as error:
        fail(error)
