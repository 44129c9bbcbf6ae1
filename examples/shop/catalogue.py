"""The goods of the shop, read once from catalogue.json and the pictures beside it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Category:
    """A shelf of the shop."""

    slug: str
    name: str
    line: str


@dataclass(frozen=True, slots=True)
class Product:
    """One of the goods. `price` is in euro cents, `stock` is what the shop opens with."""

    sku: str
    name: str
    category: str
    price: int
    stock: int
    summary: str
    description: str
    details: tuple[str, ...]
    picture: Markup


class Catalogue:
    """The goods by SKU and by category, in the order of the file.

    Raises `ValueError` for goods that the shop could not sell: a SKU given twice, an unknown
    category, a price or stock below zero.
    """

    def __init__(self, categories: Iterable[Category], products: Iterable[Product]) -> None:
        self.categories = {category.slug: category for category in categories}
        self.products: dict[str, Product] = {}
        for product in products:
            if product.sku in self.products:
                raise ValueError(f"{product.sku} is in the catalogue twice")
            if product.category not in self.categories:
                raise ValueError(f"{product.sku} is in no known category: {product.category}")
            if product.price <= 0 or product.stock < 0:
                raise ValueError(f"{product.sku} has an impossible price or stock")
            self.products[product.sku] = product

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The catalogue in `folder`: `catalogue.json` and `pictures/<SKU>.svg`."""
        content = json.loads((folder / "catalogue.json").read_text(encoding="utf-8"))
        pictures = folder / "pictures"
        return cls(
            (Category(**category) for category in content["categories"]),
            (_product(product, pictures) for product in content["products"]),
        )

    def within(self, category: str) -> list[Product]:
        """The goods of one category."""
        return [product for product in self.products.values() if product.category == category]

    def known(self, skus: Iterable[str]) -> list[Product]:
        """The goods with these SKUs, in that order; what is no longer sold is left out."""
        return [self.products[sku] for sku in skus if sku in self.products]


def _product(content: dict[str, Any], pictures: Path) -> Product:
    # The picture becomes part of the page. It may, because it is a file of ours.
    picture = Markup((pictures / f"{content['sku']}.svg").read_text(encoding="utf-8"))
    return Product(**{**content, "details": tuple(content["details"]), "picture": picture})
