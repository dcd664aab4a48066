"""Extensions of `generate` and `save_pretrained` for all causal models."""

from pathlib import Path
from typing import Any

from ratplus_exp.methods import Engine
from ratplus_exp.models.cache import SparseCache

HUB_CODE = "ratplus_hub"


class SparseGeneration:
    """Mixin for causal models: `generate` decodes with a SparseCache."""

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
    """Mixin for this project's model types: saves a file that imports their classes, so that other
    tools load them by `trust_remote_code=True` where this package is installed."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        config, causal = type(self.config), type(self)  # type: ignore[attr-defined]
        decoder = type(self.model)  # type: ignore[attr-defined]
        names = {"AutoConfig": config, "AutoModelForCausalLM": causal, "AutoModel": decoder}
        auto_map = {auto: f"{HUB_CODE}.{cls.__name__}" for auto, cls in names.items()}
        self.config.auto_map = auto_map  # type: ignore[attr-defined]
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        classes = ", ".join(cls.__name__ for cls in names.values())
        code = f'"""Needs the package ratplus_exp."""\n\nfrom ratplus_exp.models import {classes}\n'
        (Path(save_directory) / f"{HUB_CODE}.py").write_text(code, encoding="utf-8")
