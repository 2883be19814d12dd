"""The catalogue that every router enters."""

from experthub.merge import Catalogue

routers = Catalogue("route", "experthub.routers")
