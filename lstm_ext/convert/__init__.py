"""LSTM weights to and from other frameworks, as plain arrays.

The hub is `Weights`, one direction of one layer in torch's layout: w_ih [4H, I], w_hh [4H, P], b_ih and b_hh [4H] or
both None, w_hr [P, H] or None (then P = H); gates in the order i, f, g, o. Of a cell with options it is `CellWeights`,
which has these five and then peephole [3, H] (TensorFlow 1, ONNX), or gamma [2, 4H], gamma_h and beta_h [H] (haste's
LayerNormLSTM); torch's state_dict, of our modules, keeps them all. `from_x` reads what the framework x keeps, `to_x`
writes it. Where x keeps more than one direction the functions take and return several `Weights`:

    one direction      TensorFlow 1, Flax linen, Flax NNX, Equinox, haste
    a layer            Keras, ONNX: (forward,) or (forward, backward)
    a list of layers   torch's state_dict, cuDNN

To write, all functions take the same: one `Weights`; a tuple of them, the directions of one layer; or a list of layers,
each of which is one or the other. A format that keeps less refuses more.

Biases: torch adds two, b_ih + b_hh. What a framework keeps as its one bias becomes b_ih, beside a b_hh of zeros; the
other way their sum goes out. So a framework's weights come back as they were, and so do torch's where the format has
both biases (cuDNN, ONNX); elsewhere only their sum does. Where a format always has biases, absent ones become zeros. A
forget bias that is added at run time, as in TensorFlow 1, becomes b_hh; elsewhere it is part of the bias. torch trains
both biases with the gradient of their sum, which therefore moves twice as far in a step.

Arrays in: NumPy's, torch tensors on any device, or others that NumPy can read (JAX arrays, Keras variables, NNX
parameters), all of one call float16, float32 or float64 (bfloat16 goes to float32 without loss). Arrays out: NumPy's,
of the same dtype, contiguous, and copies; from `to_state_dict`, tensors. What arrays do not show is not converted:
activations other than sigmoid and tanh, clipping, dropout, zoneout.

All functions raise ValueError for missing or unknown names, numbers of arrays and shapes, and TypeError for what is no
array or has another dtype; the message names the array, what was expected and what came.
"""

from ..call import CellWeights, Weights
from .cudnn import from_cudnn, to_cudnn
from .haste import from_haste, to_haste
from .jax import from_equinox, from_linen, from_nnx, to_equinox, to_linen, to_nnx
from .onnx import from_onnx, to_onnx
from .state_dict import from_state_dict, to_state_dict
from .tensorflow import (
    from_keras,
    from_tensorflow,
    from_tensorflow_layer_norm,
    to_keras,
    to_tensorflow,
    to_tensorflow_layer_norm,
)

__all__ = [
    "CellWeights",
    "Weights",
    "from_cudnn",
    "from_equinox",
    "from_haste",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_onnx",
    "from_state_dict",
    "from_tensorflow",
    "from_tensorflow_layer_norm",
    "to_cudnn",
    "to_equinox",
    "to_haste",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_onnx",
    "to_state_dict",
    "to_tensorflow",
    "to_tensorflow_layer_norm",
]
