"""The operators `torch.ops.lstm_ext`, under the name by which programs that were exported with them import them."""

from .torch_op import layer_backward, layer_forward

__all__ = ["layer_backward", "layer_forward"]
