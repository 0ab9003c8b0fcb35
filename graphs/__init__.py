"""The ONNX pieces: the two ops, their function bodies and graph surgery. Never imports torch."""

from resprune.graphs.functions import choose_form
from resprune.graphs.selection import attach_selection, token_select_model

__all__ = ["attach_selection", "choose_form", "token_select_model"]
