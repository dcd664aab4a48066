"""A method for each layer."""

from dataclasses import dataclass
from fractions import Fraction

from ratplus_exp.methods.base import EVICTING, Method


@dataclass(frozen=True, kw_only=True)
class Layers(Method):
    """Each layer has its own method; a list shorter than the model repeats.

    The configured budget applies to every layer that selects; the nominal one is the mean over all
    layers. The measured ones include dense layers, over the queries that any layer is sparse for. A
    list instead of a number makes such a method, too: `method=dilated method.dilation=[1,16]`.
    """

    paper = "Wei and Gulcehre, 2026, arXiv 2602.18196"
    layers: tuple[Method, ...]
    names: tuple[str, ...]  # of the methods, which tell apart cells of equal sizes

    def __post_init__(self) -> None:
        latest_first = (*EVICTING, "decode", "prefill", None)
        phase = min((method.phase for method in self.layers), key=latest_first.index)
        object.__setattr__(self, "phase", phase)  # the latest in which a layer selects

    def for_layer(self, layer: int) -> Method:
        return self.layers[layer % len(self.layers)]

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.layers

    def anchor(self, layer: int) -> int:
        return self.for_layer(layer).anchor(layer)

    def check_layers(self, count: int) -> None:
        if count % len(self.layers):
            raise ValueError(
                f"the method lists {len(self.layers)} layers, but the model has {count}: list as "
                "many, or a divisor of them"
            )
        methods = [self.for_layer(layer) for layer in range(count)]
        budget = sum(method.top_k for method in methods)
        selected = sum(method.k(i, count) for i, method in enumerate(methods))
        if abs(selected - budget) > budget / 20:
            raise ValueError(
                f"all layers together select {selected} instead of {budget} candidates: list "
                "pyramidkv in as many layers of the first half as of the second"
            )
        for layer in range(count):
            anchor = self.anchor(layer)
            if self.for_layer(anchor) != self.for_layer(layer):
                raise ValueError(
                    f"layer {layer} reuses the selection of layer {anchor}, which has another "
                    "method: change the list or method.methods.shared.every"
                )

    @property
    def sparse_in(self) -> frozenset[str]:
        return frozenset[str]().union(*(method.sparse_in for method in self.layers))

    @property
    def forced(self) -> int:
        return max(method.forced for method in self.layers)

    @property
    def observed(self) -> int:
        return max(method.observed for method in self.layers)

    def fraction(self, length: int) -> Fraction:
        return sum(method.fraction(length) for method in self.layers) / Fraction(len(self.layers))

    def validate(self) -> None:
        for method in self.layers:
            method.validate()
