"""What every causal model of this project adds to `generate` and `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratplus_exp.methods import Engine
from ratplus_exp.models.cache import SparseCache

HUB_CODE = "ratplus_hub"


class SparseGeneration:
    """Mixin before a causal model: `generate` decodes with a SparseCache."""

    def new_cache(self, engine: Engine | None = None, room: int | None = None) -> SparseCache:
        """An empty cache that decodes with `engine`: `generate(past_key_values=new_cache(e))`."""
        config: Any = self.config  # type: ignore[attr-defined]
        return SparseCache(config.num_hidden_layers, engine, room)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = self.new_cache()
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )


class SavedWithCode(SparseGeneration):
    """Mixin before a causal model of our own type.

    A file of one line beside the weights names its classes, so that tools which know nothing of
    this project load it by `trust_remote_code=True` wherever the project is installed.
    """

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        config, causal = type(self.config), type(self)  # type: ignore[attr-defined]
        decoder = type(self.model)  # type: ignore[attr-defined]
        self.config.auto_map = {  # type: ignore[attr-defined]
            "AutoConfig": f"{HUB_CODE}.{config.__name__}",
            "AutoModel": f"{HUB_CODE}.{decoder.__name__}",
            "AutoModelForCausalLM": f"{HUB_CODE}.{causal.__name__}",
        }
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        names = ", ".join(cls.__name__ for cls in (config, causal, decoder))
        code = f'"""Needs the package ratplus_exp."""\n\nfrom ratplus_exp.models import {names}\n'
        (Path(save_directory) / f"{HUB_CODE}.py").write_text(code, encoding="utf-8")
