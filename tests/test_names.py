"""The checkout's folders leave other packages their import names."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def test_transformers_finds_the_kernels_package_of_hugging_face():
    """From the checkout, whose folder `kernels/` comes before installed packages in the search."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's package: pip install -e '.[dev]'")
    code = """
        import kernels, ratplus_kernels
        from transformers.integrations import hub_kernels
        from transformers.utils import is_kernels_available
        assert is_kernels_available()
        print(kernels.__version__)
    """
    done = subprocess.run(
        [sys.executable, "-c", "if True:" + code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.strip() == version, done.stderr
