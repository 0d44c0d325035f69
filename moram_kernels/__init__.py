"""Retrieval from a bank of rank-1 associative memory atoms: one operator, several backends."""

from .activation import SelfActivation
from .api import available_backends, retrieve, retrieve_linear
from .explain import explain

__all__ = ["SelfActivation", "available_backends", "explain", "retrieve", "retrieve_linear"]
