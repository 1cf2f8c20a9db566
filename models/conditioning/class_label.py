"""Class labels as a condition: one learned vector a class, and one more for no class."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from models.conditioning.conditioning import Conditioning


class ClassConditionerConfig(BaseModel, frozen=True, extra="forbid"):
    """Condition on the class of the image."""

    kind: Literal["class"] = "class"
    drop_probability: Annotated[float, Field(ge=0, le=1)] = 0.1  # per sample: train without the label, for guidance

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a batch that it reads."""
        return ("labels",)

    @property
    def token_width(self) -> int:
        """A class gives no tokens."""
        return 0

    def build(self, *, num_classes: int, embedding_width: int, token_width: int = 0) -> "ClassConditioner":
        """The conditioner for classes 0 to ``num_classes`` - 1, which gives vectors of ``embedding_width``."""
        return ClassConditioner(num_classes=num_classes, embedding_width=embedding_width)


class ClassConditioner(nn.Module):
    """Labels to vectors that are added to the time embedding; the last row of the table is the null class."""

    def __init__(self, *, num_classes: int, embedding_width: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                "A class conditioner needs a corpus with at least one class, and this one has none. Use a source with "
                "classes, or remove the conditioner of kind 'class'."
            )
        self.num_classes = num_classes
        # Rows start with unit variance: classes that are far apart from the start are learned much sooner.
        weight = torch.empty(num_classes + 1, embedding_width)
        if not weight.is_meta:  # torch imports its compiler to draw there, for two seconds
            nn.init.normal_(weight)
        self.table = nn.Embedding.from_pretrained(weight, freeze=False)

    def forward(self, conditions: Mapping[str, Tensor], dropped: Tensor) -> Conditioning:
        """Reads ``labels`` int64 (b), -1 where an image has none; ``dropped`` bool (b) marks those without theirs.

        Null labels are chosen by ``where``, so that the graph is the same for every batch.
        """
        return Conditioning(embedding=self.table(self.rows(conditions, dropped)))

    def rows(self, conditions: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """Rows of the table (b,) int64, the null class's among them; arguments as in ``forward``."""
        labels = conditions["labels"]
        return torch.where(dropped | (labels < 0), self.num_classes, labels)
