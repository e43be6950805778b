"""Tensors of torch and TensorFlow as plain data; `sandbox_data.py` says how.

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import sys
from importlib import import_module as library


def torch_node(value, kind, refer):
    """The node of an object of torch, whose type is `kind`; None for others."""
    torch = sys.modules["torch"]
    if kind is torch.Size:
        return ["size", *value]
    if kind is torch.dtype:
        return ["torch dtype", str(value).partition(".")[2]]
    if kind not in (torch.Tensor, torch.nn.Parameter):
        return None
    kept = [value.requires_grad, kind is torch.nn.Parameter]
    plain = value.detach().cpu()
    if plain.layout is torch.sparse_coo:
        plain = plain.coalesce()
        return ["sparse tensor", *map(refer, (plain.indices(), plain.values())), list(plain.shape)]
    if plain.layout is not torch.strided or plain.is_quantized:
        return None
    name = str(plain.dtype).partition(".")[2]
    plain = plain.resolve_conj().resolve_neg().contiguous()
    if plain.dtype is torch.bfloat16:
        plain = plain.view(torch.int16)
    return ["tensor", name, *kept, refer(plain.numpy())]


def _torch_dtype(value_of, name):
    torch = library("torch")
    dtype = getattr(torch, name)
    if type(dtype) is not torch.dtype:
        raise ValueError(name)
    return dtype


def _tensor(value_of, name, requires_grad, is_parameter, array):
    torch, dtype = library("torch"), _torch_dtype(value_of, name)
    tensor = torch.from_numpy(value_of(array))
    if tensor.dtype is not dtype:
        tensor = tensor.view(dtype)
    if is_parameter:
        return torch.nn.Parameter(tensor, bool(requires_grad))
    return tensor.requires_grad_(bool(requires_grad))


def _sparse_tensor(value_of, indices, values, shape):
    torch = library("torch")
    return torch.sparse_coo_tensor(
        value_of(indices), value_of(values), shape, check_invariants=True
    ).coalesce()


def tensorflow_node(value, kind, refer):
    """The node of an object of TensorFlow, whose type is `kind`; None for others."""
    tensorflow = sys.modules["tensorflow"]
    if isinstance(value, tensorflow.DType):
        return ["tf dtype", value.name]
    if isinstance(value, tensorflow.TensorShape):
        return ["tf shape", None if value.rank is None else value.as_list()]
    if kind.__name__ in ("EagerTensor", "ResourceVariable"):
        array = value.numpy()
        if hasattr(array, "dtype") and array.dtype.kind == "V":  # bfloat16, which numpy lacks
            return None
        return ["eager", value.dtype.name, kind.__name__ == "ResourceVariable", refer(array)]
    if kind is tensorflow.RaggedTensor:
        parts = value.flat_values, *value.nested_row_splits
        return ["ragged", *map(refer, parts)]
    if kind is tensorflow.SparseTensor:
        return ["tf sparse", *map(refer, (value.indices, value.values, value.dense_shape))]
    return None


def _eager(value_of, name, is_variable, array):
    tensorflow = library("tensorflow")
    make = tensorflow.Variable if is_variable else tensorflow.constant
    return make(value_of(array), dtype=tensorflow.dtypes.as_dtype(name))


def _ragged(value_of, flat, *splits):
    make = library("tensorflow").RaggedTensor.from_nested_row_splits
    return make(value_of(flat), list(map(value_of, splits)), validate=True)


BUILDERS = {
    "size": lambda value_of, *lengths: library("torch").Size(lengths),
    "torch dtype": _torch_dtype,
    "tensor": _tensor,
    "sparse tensor": _sparse_tensor,
    "tf dtype": lambda value_of, name: library("tensorflow").dtypes.as_dtype(name),
    "tf shape": lambda value_of, dims: library("tensorflow").TensorShape(dims),
    "eager": _eager,
    "ragged": _ragged,
    "tf sparse": lambda value_of, *parts: library("tensorflow").SparseTensor(*map(value_of, parts)),
}
