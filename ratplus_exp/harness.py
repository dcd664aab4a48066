"""lm-evaluation-harness with one more model type, `ratplus`: any of our models under any method.

    python -m ratplus_exp.harness --model ratplus --model_args pretrained=DIR,method=moba --tasks …

is `lm_eval …`, which finds the model types of other packages only once they are imported.
"""

from __future__ import annotations

from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from ratplus_exp.config import CONF, method_of, validate
from ratplus_exp.methods import Engine
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.stages.cells import DECODING
from ratplus_exp.stages.common import check_context, first_token_of, model_of, resolve
from ratplus_exp.stages.evaluate import answers

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1}
HARNESS = ("add_bos_token", "prefix_token_id", "chat_template_args", "enable_thinking")


@register_model("ratplus")
class RatPlus(HFLM):
    """The harness's requests, tokenised and cut by the harness, answered by our models and engine.

    Args:
        pretrained: a model's folder.
        cut: where prompts longer than data.length lose tokens: "left" or "middle" (LongBench).
        words: overrides as for `run.py model=hf` (method, budget, data, method.block_size, …), and
            HARNESS, which go to the harness's own model type.

    Raises ValueError for what `run.py` refuses, and for settings that are not supported here.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        cut: str = "left",
        **words: Any,
    ) -> None:
        options = {name: words.pop(name) for name in HARNESS if name in words}
        words |= {"device": device} if device else {}
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            cfg = compose("config", ["model=hf", *(f"{k}={x}" for k, x in words.items())])
        cfg.model.path = str(pretrained)
        validate(cfg)
        for name, value, supported in (
            ("selector", cfg.selector, ("topk",)),
            ("data.protocol", cfg.data.protocol, ("whole",)),
            ("cut", cut, ("left", "middle")),
        ):
            if value not in supported:
                choices = " or ".join(supported)
                raise ValueError(f"{name}={value} is not supported here: use {choices}")
        if not str(size := batch_size or cfg.data.batch_size).isdigit():
            raise ValueError(f"batch_size={size}: use a number")
        self.cfg, self.cut, path = cfg, cut, resolve(cfg.model.path)
        self.method = method_of(cfg)
        self.fed = int(first_token_of(cfg) == "decode" and self.method.phase in DECODING)
        self.measured: list[float] = []  # budget of each answer
        tokenizer = load_tokenizer(path)
        check_context(cfg)
        super().__init__(
            model_of(cfg),
            tokenizer=tokenizer,
            backend="causal",
            batch_size=size,
            max_length=cfg.data.length,
            **{"add_bos_token": False} | options,
        )
        self.pretrained = str(path)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results report of the model, in addition to its arguments."""
        nominal = str(self.method.fraction(self.cfg.data.length))
        measured = sum(self.measured) / len(self.measured) if self.measured else None
        return {"method": repr(self.method), "budget": nominal, "budget_measured": measured}

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int = 0, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Prompts and mask (B, T), left-padded, of at most left_truncate_len tokens each."""
        rows = [self.tok_encode(text) for text in strings]
        for row in rows if left_truncate_len else ():
            start = left_truncate_len // 2 if self.cut == "middle" else 0
            del row[start : max(start, start + len(row) - left_truncate_len)]
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Prompts (B, T) followed by their answers; the harness cuts the answers at `stop`."""
        for name, value in GREEDY.items():
            if (other := options.get(name) or value) != value:
                raise ValueError(f"{name}={other}: decoding is greedy, set {name}={value}")
        prompts = PromptBatch(self.model, context, options["attention_mask"], self.fed)
        engine = Engine(self.method)
        room = max_length - context.shape[1]
        out, last = answers(prompts, engine, room, self.tokenizer, self.cfg)
        self.measured += engine.usage.fractions(len(out), last).tolist()
        return torch.cat((context, out), 1)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids): the continuation's log-probability after
        its context, and whether it is the greedy one."""
        if self.method.phase and self.method.dense_prefill:
            raise ValueError(
                f"log-likelihoods are of prompt tokens, which {type(self.method).__name__} leaves "
                f"dense: use a method that selects for prompts (method=moba) or method=dense"
            )
        results: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for start in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm):
            indices = order[start : start + self.batch_size]
            ends = [torch.tensor(requests[i][2], device=self.device) for i in indices]
            rows = [(requests[i][1] + requests[i][2])[-self.max_length - 1 : -1] for i in indices]
            batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
            cache = self.model.new_cache(Engine(self.method))
            logits = self.model(
                **batch, past_key_values=cache, logits_to_keep=max(map(len, ends))
            ).logits.float()
            for i, row, end in zip(indices, logits.log_softmax(-1), ends, strict=True):
                row = row[-len(end) :]
                greedy = bool((row.argmax(-1) == end).all())
                results[i] = float(row.gather(1, end[:, None]).sum()), greedy
        return [results[i] for i in range(len(requests))]


if __name__ == "__main__":
    cli_evaluate()
