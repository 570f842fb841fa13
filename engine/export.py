"""
A backbone as a program that needs none of our code: an ONNX graph, or a program of torch.export.

    write_onnx    OUT.onnx; from 2 GB on the weights beside it in OUT.onnx.data, a tensor at a time
    write_torch   OUT.pt2
    traced        the network as torch.export sees it: batch and sides are free, positions are computed from them
    compare       the largest difference of what is written from the network itself

    images  B C H W float32, normalised, whole patches, two or more each way -> cls B D, patches B P D float32

Dimension letters: see the top of model.py.
"""

import json
import logging
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import ops

NAMES = "cls", "patches"
SPLITS = torch.ops.aten.split_with_sizes.default, torch.ops.aten.split.sizes
OPSET = 18
ALONE = 1.9e9                   # bytes of weights that a file of protobuf's 2 GB holds
ALIGNED = 4096                  # bytes: where a tensor begins in OUT.onnx.data, so that it can be mapped
BATCHES = 1, 3                  # what is compared
GRIDS = (14, 14), (5, 9), (2, 3)  # and in how many patches
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.1}  # differences from float32 that are errors; measured: see LOG.md

# --------------------------------------------------------------------------------
# The program


class Outputs(nn.Module):
    """The network in its own dtype, between float32 images and float32 features"""

    def __init__(self, model, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images):
        found = self.model(images.to(self.dtype))
        return found.cls.float(), found.patches.float()


def traced(model, dtype):
    """Network of this dtype, with or without values -> ExportedProgram"""
    p, before = model.config.patch_size, ops.mode
    sides = {2: p * Dim("h", min=2, max=4096), 3: p * Dim("w", min=2, max=4096)}
    images = torch.zeros(2, model.config.in_chans, 3 * p, 5 * p, device=next(model.parameters()).device)
    ops.use_kernels("off")  # the definitions: what others have no kernels for
    try:
        with torch.no_grad(), quiet():
            return without_splits(torch.export.export(Outputs(model, dtype), (images,), strict=True, dynamic_shapes=(
                {0: Dim("batch", min=1, max=65536)} | sides,)))
    finally:
        ops.use_kernels(before)


def without_splits(program):
    """Slices in the place of splits, which ONNX has as sequences of tensors, and few of its runtimes."""
    graph = program.graph
    for node in [node for node in graph.nodes if node.target in SPLITS]:
        x, sizes, *dim = node.args
        for part in list(node.users):
            k = part.args[1]
            first, last = sum(sizes[:k]), k == len(sizes) - 1  # all sizes but the last one are numbers
            with graph.inserting_before(part):
                piece = graph.call_function(torch.ops.aten.slice.Tensor, (
                    x, *(dim or [0]), first, sys.maxsize if last else first + sizes[k]))
            piece.meta = dict(part.meta)
            part.replace_all_uses_with(piece)
            graph.erase_node(part)
        graph.erase_node(node)
    program.graph_module.recompile()
    return program


@contextmanager
def quiet():
    """Exporters talk of versions and passes."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def compare(run, model):
    """
    run      images -> (cls, patches)    model  the network, float32
    returns  the largest difference of any number, over BATCHES and GRIDS
    """
    worst, before = 0.0, ops.mode
    ops.use_kernels("off")
    try:
        for n in BATCHES:
            for h, w in GRIDS:
                side, g = model.config.patch_size, torch.Generator().manual_seed(100 * h + n)
                images = torch.randn(n, model.config.in_chans, h * side, w * side, generator=g)
                with torch.no_grad():
                    exact = model(images)
                    found = [torch.as_tensor(x).float() for x in run(images)]
                for a, b in zip(found, (exact.cls, exact.patches), strict=True):
                    difference = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
                    worst = max(worst, difference if difference == difference else float("inf"))
        return worst
    finally:
        ops.use_kernels(before)


def judged(path, worst, dtype):
    """Raises ValueError for a difference that is an error."""
    if worst > BOUNDS[dtype]:
        raise ValueError(f"{path}: it says something else than the network, by {worst:.2g} where {BOUNDS[dtype]:g} are "
                         "allowed, and is not kept; other versions of torch and onnxscript may do better")
    return worst


@contextmanager
def gathered(path):
    """A folder beside path, whose files take their places when all is well; else nothing is left"""
    folder = path.with_name(f".{os.getpid()}{path.name}")
    try:
        folder.mkdir(parents=True)
        yield folder
        for file in folder.iterdir():
            file.replace(path.parent / file.name)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}; name a place with room") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)

# --------------------------------------------------------------------------------
# Files


def write_torch(path, model, dtype):
    """
    model    the network, float32
    returns  the largest difference;  raises ValueError: too large, no room
    """
    path, copy = Path(path), model
    if dtype != torch.float32:
        copy = type(model)(model.config).eval()
        copy.load_state_dict(model.state_dict())
        copy.to(dtype)
    with gathered(path) as folder:
        torch.export.save(traced(copy, dtype), folder / path.name)
        return judged(path, compare(torch.export.load(folder / path.name).module(), model), dtype)


def write_onnx(path, skeleton, tensors, dtype, network):
    """
    skeleton  the network without storage    tensors  iterator over (name, tensor), all of them, float32
    network   () -> the network with values, float32, to compare with; None: nothing is compared
    returns   the largest difference, or None;  raises ValueError: too large, no room, an extra that is not installed
    """
    ir, onnxscript, _ = needed()
    path, size = Path(path), sum(x.numel() for x in skeleton.state_dict().values()) * dtype.itemsize
    model = skeleton.to(dtype)  # still without storage: torch.export copies what has some
    with quiet():
        made = torch.onnx.export(traced(model, dtype), (), None, dynamo=True, opset_version=OPSET, optimize=False,
                                 input_names=["images"], output_names=list(NAMES), verbose=False).model
    initializers = {name.removeprefix("model."): x for name, x in made.graph.initializers.items()}
    shapes = ["batch", skeleton.config.in_chans, "height", "width"], ["batch", skeleton.config.width], [
        "batch", "patches", skeleton.config.width]
    for value, shape in zip([*made.graph.inputs, *made.graph.outputs], shapes, strict=True):
        value.shape = ir.Shape(shape)
    made.metadata_props["config"] = json.dumps(asdict(skeleton.config))
    with gathered(path) as folder:
        beside = folder / f"{path.name}.data" if size > ALONE else None
        filled = fill(ir, initializers, tensors, dtype, beside)
        lacking = [name for name in initializers if name not in filled and name in skeleton.state_dict()]
        assert not lacking, f"the graph wants {lacking}"
        with quiet():
            onnxscript.optimizer.optimize(made, onnx_shape_inference=False)
        made.producer_name = "nanodino"
        for node in made.graph:  # what it was traced from: lines of our code, and where that lay
            for part in (node, *node.outputs):
                part.metadata_props.clear()
        ir.save(made, folder / path.name)
        return None if network is None else judged(path, compare(session(folder / path.name), network()), dtype)


def fill(ir, initializers, tensors, dtype, beside):
    """Gives the graph's weights their values, in memory or, a tensor at a time, in the file beside -> their names."""
    filled, at = set(), 0
    with open(beside or os.devnull, "wb") as file:
        for name, x in tensors:
            if name not in initializers:
                continue  # the mask token, norms of training
            slot = initializers[name]
            x = (x.float() if name.endswith("periods") else x.to(dtype)).contiguous()
            assert tuple(slot.shape) == tuple(x.shape), name
            filled.add(name)
            if beside is None:
                slot.const_value = ir.tensor(x.numpy().copy(), name=slot.name)
                continue
            data = x.numpy().tobytes()
            file.write(b"\0" * (-at % ALIGNED))
            at += -at % ALIGNED
            file.write(data)
            slot.const_value = ir.ExternalTensor(beside.name, at, len(data), slot.dtype, shape=slot.shape,
                                                 name=slot.name, base_dir=beside.parent)
            at += len(data)
    return filled


def session(path):
    """An ONNX file as a function: images, a tensor -> (cls, patches), arrays"""
    _, _, runtime = needed()
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    run = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run
    return lambda images: run(list(NAMES), dict(images=images.numpy()))


def needed():
    try:
        import onnx_ir
        import onnxruntime
        import onnxscript
        import onnxscript.optimizer
        return onnx_ir, onnxscript, onnxruntime
    except ImportError as error:
        raise ValueError(f"--to onnx: {error.name} is not installed; pip install -e .[export]") from error
