"""The catalogue that every merge enters."""

from experthub.merge._catalogue import Catalogue

merges = Catalogue("merge", "experthub.merges")
