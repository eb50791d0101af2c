"""fp16 written into the graph: weights stored as float16, casts at its ends, float where float16 ends.

The graph itself says what is computed in what, so it means the same to every runtime; TensorRT has no flag for it any
more. A node stays in float32 when what it reads or makes is beyond 65504 on the calibration images, when its constants
would vanish, or when its operator has no float16. An LMA layer stays in float32 as a whole, as it does under INT8: the
cuts and the sums of slopes do not survive 11 bits, and a compiler fuses its nodes with the casts around it.

Images and logits are float32 as before. A tensor t of the float model is called t_fp16 where it is float16.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import unknown
from edgekd.quantize import account, calibration, ptq
from edgekd.quantize.graph import HALF, STANDARD_DOMAINS, Graph, copied, load
from edgekd.quantize.quantizers import ModelQuantizer, Samples
from edgekd.registry import register

Array = npt.NDArray[Any]
LARGEST = float(np.finfo(np.float16).max)
# Rounding to float16 costs 73 dB; below its smallest normal number, 6.1e-5, it costs more with every halving.
LOW_SQNR_DB = 40.0


@register("quantizer", "fp16")
class FP16(ModelQuantizer):
    """Weights and activations in half precision, float where its range ends, LMA in float.

    keep_float: layers that stay in float, by name.
    """

    precision: ClassVar[Literal["fp16"]] = "fp16"
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    def __init__(self, *, keep_float: list[str] = []) -> None:  # noqa: B006
        self.keep_float = list(keep_float)

    def write(self, model: Path, out: Path, samples: Samples) -> dict[str, Any]:
        """Write the float model as fp16 to `out`; facts as of `quantize`, and `account`: layers, still_float."""
        facts = quantize(model, out, samples.calibration, keep_float=self.keep_float)
        rows = layers(load(model), onnx.load(str(out)), samples.calibration[: account.IMAGES])
        own = {row["layer"] for row in rows}
        return facts | {"account": {"layers": rows, "still_float": [n for n in facts["still_float"] if n in own]}}


def quantize(model: Path, out: Path, images: Array, *, keep_float: Collection[str] = ()) -> dict[str, Any]:
    """Write a float `model` as fp16 to `out`.

    images: float32 [N, C, H, W], as the network takes them, on which ranges are measured. keep_float: names of layers.

    Returns:
        images (how many), layers (names), lma (names), keep_float, still_float: layers and LMA layers in float, casts:
        how many there are, warnings: a sentence for each node that stays in float by its values, size_bytes.

    Raises:
        DataError: the model cannot be converted, or the images do not fit it. RecipeError: no such layer.
    """
    graph = load(model)
    known = [layer.name for layer in graph.layers]
    for name in keep_float:
        if name not in known:
            raise unknown("quantize.keep_float", name, known, noun="layer of the model")
    floats = _float_tensors(graph)
    made = [name for node in graph.model.graph.node for name in node.output if name in floats]
    inside = {name for region in graph.lma for node in region.nodes for name in node.output if name != region.output}
    measured = [name for name in made if name not in graph.constants and name not in inside]
    ranges = calibration.measure(graph, [graph.image.name, *measured], images)
    reasons = dict(_reasons(graph, floats, ranges.largest, keep_float))
    written = _written(graph, floats, {at for at in range(len(graph.model.graph.node)) if at not in reasons})
    onnx.checker.check_model(written, full_check=True)
    onnx.save(written, str(out))
    position = {id(node): at for at, node in enumerate(graph.model.graph.node)}
    names = {position[id(layer.node)]: layer.name for layer in graph.layers}
    return {
        "images": len(images),
        "layers": known,
        "lma": [region.name for region in graph.lma],
        "keep_float": sorted(keep_float),
        "still_float": [names[at] for at in sorted(reasons) if at in names] + [region.name for region in graph.lma],
        "casts": sum(node.op_type == "Cast" for node in written.graph.node)
        - sum(node.op_type == "Cast" for node in graph.model.graph.node),
        "warnings": [
            *ranges.warnings,
            *(f"{names.get(at) or graph.model.graph.node[at].name} stays in float: {why}"
              for at, why in sorted(reasons.items()) if why),
        ],
        "size_bytes": out.stat().st_size,
    }  # fmt: skip


def layers(graph: Graph, written: onnx.ModelProto, images: Array) -> list[account.Row]:
    """What each layer lost to fp16: the rows of `account.layers`. graph: the float model; images [N, C, H, W]."""
    return account.layers(graph, in_float(written), {}, images)


def in_float(written: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all that is float16 also as float32, under the name that it has in the float model."""
    shown = copied(written)
    there = {name for node in shown.graph.node for name in node.output}
    for tensor in written.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16 and tensor.name.removesuffix(HALF) not in there:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            shown.graph.initializer.append(numpy_helper.from_array(values, tensor.name.removesuffix(HALF)))
    for name in there:
        if name.endswith(HALF) and name.removesuffix(HALF) not in there | {shown.graph.input[0].name}:
            shown.graph.node.append(_cast(name, name.removesuffix(HALF), TensorProto.FLOAT))
    return shown


def _reasons(
    graph: Graph, floats: Collection[str], largest: Mapping[str, float], keep_float: Collection[str]
) -> Iterator[tuple[int, str]]:
    """The nodes that stay in float32, by position, and what to tell of it: nothing where it was to be expected."""
    inside = {id(node) for region in graph.lma for node in region.nodes}
    kept = {id(layer.node) for layer in graph.layers if layer.name in keep_float}
    layer_nodes = {id(layer.node) for layer in graph.layers}
    for at, node in enumerate(graph.model.graph.node):
        if id(node) in inside | kept or not _has_half(graph, node, floats):
            yield at, ""
            continue
        weights, bias = (node.input[:2], node.input[2:]) if id(node) in layer_nodes else (node.input, ())
        # What a bias loses is added to what the layer makes: below half a unit of that it is nothing.
        unseen = largest.get(node.output[0], 0.0) / 2048
        why_input = next(_beyond(weights, "input", graph, largest), "")
        why_input = why_input or next(_beyond(bias, "input", graph, largest, unseen), "")
        why = why_input or next(_beyond(node.output, "output", graph, largest), "")
        if why:
            # What only hands on values that are too large already is not worth a sentence of its own.
            yield at, why if not why_input or id(node) in layer_nodes else ""


def _beyond(
    names: Collection[str], what: str, graph: Graph, largest: Mapping[str, float], unseen: float = 0.0
) -> Iterator[str]:
    for name in names:
        constant = graph.constants.get(name)
        if constant is None:
            if largest.get(name, 0.0) > LARGEST:
                yield f"its {what} reaches {largest[name]:.3g} on the calibration images, fp16 ends at {LARGEST:.0f}"
        elif constant.dtype == np.float32 and constant.any():
            if not np.abs(constant).max() <= LARGEST:
                yield f"its constant {name} reaches {np.abs(constant).max():.3g}, fp16 ends at {LARGEST:.0f}"
                continue
            half = constant.astype(np.float16)
            if np.abs(constant - half).max() > unseen and (sqnr := ptq.sqnr_db(constant, half)) < LOW_SQNR_DB:
                yield f"its constant {name} is too small for fp16, which would keep {sqnr:.0f} dB of it"


def _has_half(graph: Graph, node: onnx.NodeProto, floats: Collection[str]) -> bool:
    """Whether the operator takes float16 wherever this node has float32, and makes its values of others at all."""
    standard = node.domain in STANDARD_DOMAINS
    if not standard or node.op_type == "Cast" or not any(name in floats for name in node.input):
        return False
    opset = next(entry.version for entry in graph.model.opset_import if entry.domain in STANDARD_DOMAINS)
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for at, name in enumerate(names):
            if name in floats and "tensor(float16)" not in formal[min(at, len(formal) - 1)].types:
                return False
    return True


def _float_tensors(graph: Graph) -> set[str]:
    """The names of all float32 tensors of a model."""
    inferred = onnx.shape_inference.infer_shapes(graph.model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return found | {name for name, value in graph.constants.items() if value.dtype == np.float32}


def _written(graph: Graph, floats: Collection[str], halves: Collection[int]) -> onnx.ModelProto:
    """The model with the nodes at the positions `halves` in float16."""
    model = copied(graph.model)
    nodes: list[onnx.NodeProto] = []
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    there = {graph.image.name, *constants}

    def name_in(name: str, half: bool) -> str:
        """The tensor in the precision asked for; what has it in the other one only is cast."""
        if name not in floats:
            return name
        wanted = name + HALF if half else name
        if wanted in there:
            return wanted
        there.add(wanted)
        if half and name in graph.constants:
            constants[wanted] = numpy_helper.from_array(graph.constants[name].astype(np.float16), wanted)
        elif half:
            nodes.append(_cast(name, wanted, TensorProto.FLOAT16))
        else:
            nodes.append(_cast(name + HALF, wanted, TensorProto.FLOAT))
        return wanted

    for at, node in enumerate(model.graph.node):
        half = at in halves
        node = copied(node)
        node.input[:] = [name_in(name, half) for name in node.input]
        node.output[:] = [name + HALF if half and name in floats else name for name in node.output]
        there.update(node.output)
        nodes.append(node)
    for value in model.graph.output:
        name_in(value.name, half=False)
    read = {name for node in nodes for name in node.input} | graph.outputs
    nodes = [node for node in nodes if node.op_type != "Constant" or node.output[0] in read]
    kept = [copied(tensor) for name, tensor in constants.items() if name in read]
    for field, values in (
        (model.graph.node, nodes), (model.graph.initializer, kept), (model.graph.value_info, []),
    ):  # fmt: skip
        del field[:]
        field.extend(values)
    return model


def _cast(name: str, made: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [name], [made], f"{made}_cast", to=to)
