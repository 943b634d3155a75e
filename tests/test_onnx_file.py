"""What is read of an ONNX file by its bytes, against what the `onnx` package reads of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings

from edge_agent.errors import ModelError
from edge_agent.models.onnx_file import Survey, external_files, require_numbers, survey

pytestmark = pytest.mark.slow

onnx: Any = pytest.importorskip("onnx", reason="not installed: pip install 'edge-agent[convert]'")

PLAIN = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
KINDS: dict[int, Any] = {1: np.float32, 10: np.float16, 11: np.float64}
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def look(file: Path, content: bytes | Any, *, values: bool = True) -> Survey:
    file.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return survey(file, values=values)


def code_of(file: Path, content: bytes) -> str | None:
    """None where it will do; any other exception flies."""
    try:
        look(file, content)
    except ModelError as error:
        return error.code
    return None


# Networks as they may be: tensors wherever the format has a place for one


def numbers(name: str, dtype: int, values: list[float], way: str) -> Any:
    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=[len(values)])
    array = np.array(values, KINDS[dtype])
    if way == "raw":
        tensor.raw_data = array.tobytes()
    elif dtype == 1:
        tensor.float_data.extend(array.tolist())
    elif dtype == 11:
        tensor.double_data.extend(array.tolist())
    else:
        tensor.int32_data.extend(array.view(np.uint16).tolist())
    return tensor


def outside(name: str, location: str, order: bool) -> Any:
    tensor = onnx.TensorProto(name=name, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    said = {"location": location, "offset": "0", "length": "4"}
    for key in sorted(said, reverse=order):
        tensor.external_data.add(key=key, value=said[key])
    return tensor


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.lists(st.one_of(st.sampled_from([0.0, -1.5, INFINITE, -INFINITE]), st.just(NAN)), min_size=1, max_size=6)
TENSORS = st.one_of(
    st.builds(numbers, WORDS, st.sampled_from(list(KINDS)), VALUES, st.sampled_from(["raw", "data"])),
    st.builds(outside, WORDS, WORDS, st.booleans()),
)


def attribute(kind: str, content: list[Any]) -> Any:
    made = onnx.AttributeProto(name=kind)
    if kind == "t":
        made.t.CopyFrom(content[0])
    elif kind == "tensors":
        made.tensors.extend(content)
    elif kind == "sparse_tensor":
        made.sparse_tensor.values.CopyFrom(content[0])
        made.sparse_tensor.indices.CopyFrom(content[-1])
    elif kind == "sparse_tensors":
        for tensor in content:
            made.sparse_tensors.add().values.CopyFrom(tensor)
    elif kind == "g":
        made.g.CopyFrom(content[0])
    else:
        made.graphs.extend(content)
    return made


def graph(initializers: list[Any], sparse: list[Any], nodes: list[Any]) -> Any:
    made = onnx.GraphProto(name="g", initializer=initializers, node=nodes)
    for tensor in sparse:
        made.sparse_initializer.add().indices.CopyFrom(tensor)
    return made


def node(attributes: list[Any]) -> Any:
    return onnx.NodeProto(op_type="If", attribute=attributes)


FEW = st.lists(TENSORS, max_size=2)
OF_TENSORS = st.builds(
    attribute,
    st.sampled_from(["t", "tensors", "sparse_tensor", "sparse_tensors"]),
    st.lists(TENSORS, min_size=1, max_size=2),
)
GRAPHS = st.recursive(
    st.builds(graph, FEW, FEW, st.lists(st.builds(node, st.lists(OF_TENSORS, max_size=2)), max_size=2)),
    lambda inner: st.builds(
        graph,
        FEW,
        FEW,
        st.lists(
            st.builds(
                node,
                st.lists(
                    st.builds(attribute, st.sampled_from(["g", "graphs"]), st.lists(inner, min_size=1, max_size=2)),
                    max_size=2,
                ),
            ),
            max_size=2,
        ),
    ),
    max_leaves=4,
)


def model(main: Any, functions: list[Any], training: list[Any]) -> Any:
    made = onnx.ModelProto(ir_version=8, graph=main)
    made.opset_import.add(domain="", version=17)
    for inner in functions:
        function = made.functions.add(name="f", node=[node([attribute("g", [inner])])])
        function.attribute_proto.append(attribute("g", [inner]))
    for number, inner in enumerate(training):
        place = made.training_info.add()
        (place.initialization if number % 2 else place.algorithm).CopyFrom(inner)
    return made


MODELS = st.builds(model, GRAPHS, st.lists(GRAPHS, max_size=1), st.lists(GRAPHS, max_size=2))


def tensors_of(found: Any) -> Iterator[Any]:
    """Every TensorProto in a message, by the message's own description."""
    if isinstance(found, onnx.TensorProto):
        yield found
        return
    for described, content in found.ListFields():
        if described.message_type is not None:
            repeated = not hasattr(content, "ListFields")
            for inner in content if repeated else [content]:
                yield from tensors_of(inner)


def has_nan(tensor: Any) -> bool:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return False
    return bool(np.isnan(onnx.numpy_helper.to_array(tensor)).any())


@PLAIN
@given(made=MODELS)
def test_what_the_onnx_package_finds_is_found(file: Path, made: Any) -> None:
    found = look(file, made)
    tensors = list(tensors_of(made))
    locations = {pair.value for tensor in tensors for pair in tensor.external_data if pair.key == "location"}
    assert set(found.external) == locations
    assert len(found.external) == len(locations)
    assert sorted(found.not_finite) == sorted(tensor.name for tensor in tensors if has_nan(tensor))
    assert look(file, made, values=False) == Survey(found.external, [])


def test_every_place_where_the_format_has_tensors_is_looked_at(file: Path) -> None:
    """One tensor at the end of each way through the format, as the installed onnx describes it."""
    ways = list(ways_to_tensors(onnx.ModelProto.DESCRIPTOR, ()))
    assert len(ways) > 50
    for way in ways:
        made = model(onnx.GraphProto(name="g"), [], [])
        place: Any = made
        for name, is_repeated in way:
            place = getattr(place, name).add() if is_repeated else getattr(place, name)
        place.CopyFrom(outside("w", "weights", False))
        assert look(file, made).external == ["weights"], way
        place.CopyFrom(numbers("w", 1, [NAN], "raw"))
        assert look(file, made).not_finite == ["w"], way


def ways_to_tensors(described: Any, way: tuple[tuple[str, bool], ...]) -> Iterator[tuple[tuple[str, bool], ...]]:
    if described.name == "TensorProto":
        yield way
        return
    for one in described.fields if len(way) < 7 else ():
        if one.message_type is not None:
            is_repeated = one.is_repeated if hasattr(one, "is_repeated") else one.label == one.LABEL_REPEATED
            yield from ways_to_tensors(one.message_type, (*way, (one.name, is_repeated)))


# Numbers that are none


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("way", ["raw", "data"])
def test_nan_is_found_and_infinity_is_none(file: Path, dtype: int, way: str) -> None:
    for values, bad in (([0.0, NAN], ["w"]), ([INFINITE, -INFINITE, 65504.0], []), ([], []), ([-NAN], ["w"])):
        assert look(file, model(graph([numbers("w", dtype, values, way)], [], []), [], [])).not_finite == bad


@PLAIN
@given(bits=st.lists(st.integers(0, 0xFFFF), max_size=20))
@example([0x7C00, 0xFC00, 0x7BFF, 0x80])
@example([0x7C01])
@example([0xFE00])
def test_any_half_is_judged_as_numpy_does(file: Path, bits: list[int]) -> None:
    array = np.array(bits, np.uint16).view(np.float16)
    for way in ("raw", "data"):
        tensor = onnx.TensorProto(name="w", data_type=10, dims=[len(bits)])
        if way == "raw":
            tensor.raw_data = array.tobytes()
        else:
            tensor.int32_data.extend(bits)
        found = look(file, model(graph([tensor], [], []), [], []))
        assert found.not_finite == (["w"] if np.isnan(array).any() else [])


def test_whole_numbers_with_the_bits_of_nan_are_numbers(file: Path) -> None:
    ones = b"\xff" * 8
    for dtype in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.UINT8, onnx.TensorProto.INT8):
        tensor = onnx.TensorProto(name="w", data_type=dtype, raw_data=ones)
        assert look(file, model(graph([tensor], [], []), [], [])).not_finite == []


def test_numbers_that_are_not_packed_are_numbers_too(file: Path) -> None:
    """Writers pack them; readers take both."""
    bare = onnx.TensorProto(name="w", data_type=1, dims=[1]).SerializeToString()
    tensor = bare + b"\x25" + np.float32(NAN).tobytes()  # field 4, 32 bits
    assert np.isnan(onnx.TensorProto.FromString(tensor).float_data[0])
    made = model(onnx.GraphProto(name="g"), [], [])
    content = made.SerializeToString() + field(7, field(5, tensor))
    assert look(file, content).not_finite == ["w"]


def test_the_sentence_names_the_weights(file: Path) -> None:
    bad = [numbers(name, 1, [NAN], "raw") for name in ("a", "b", "c", "d")]
    file.write_bytes(model(graph(bad, [], []), [], []).SerializeToString())
    with pytest.raises(ModelError, match=r"net\.onnx: weights are not numbers \(NaN\): a, b, c, …") as caught:
        require_numbers(file)
    assert caught.value.code == "model_not_finite"


def test_the_last_of_many_weights_is_looked_at(file: Path) -> None:
    values = np.zeros(5 * (1 << 20) + 3, np.float32)
    values[-1] = NAN
    for array in (values, values[::-1].copy()):
        made = model(graph([onnx.numpy_helper.from_array(array, "w")], [], []), [], [])
        assert look(file, made).not_finite == ["w"]
    assert look(file, made, values=False).not_finite == []


# Files that are cut, or are something else


def field(number: int, content: bytes) -> bytes:
    size, prefix = len(content), b""
    while size >= 128:
        prefix, size = prefix + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + prefix + bytes([size]) + content


def sound(name: str) -> bytes:
    weights = [onnx.numpy_helper.from_array(np.ones(40, np.float32), "w"), outside("o", "weights", False)]
    body = graph(weights, [], [])
    made = model(graph(weights, weights, [node([attribute("g", [body])])]), [body], [body])
    made.producer_name, made.doc_string = name, "words " * 30
    content: bytes = made.SerializeToString()
    return content


def test_a_file_cut_anywhere_is_truncated_or_still_whole(file: Path) -> None:
    content = sound("tests")
    assert code_of(file, content) is None
    for end in range(len(content)):
        code = code_of(file, content[:end])
        assert code in (None, "model_truncated"), end
        if code is None:  # a cut between two fields, with graph and version before it
            assert onnx.ModelProto.FromString(content[:end]).HasField("graph")
            assert onnx.ModelProto.FromString(content[:end]).opset_import


@PLAIN
@given(content=st.binary(max_size=400))
@example(b"")
@example(b"\x3a" * 300)
@example(b"\xff" * 300)
@example(b"\x0b" * 300)  # groups
def test_any_bytes_are_a_model_or_a_model_error(file: Path, content: bytes) -> None:
    assert code_of(file, content) in (None, "model_truncated", "model_rejected")


@settings(PLAIN, max_examples=300)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
def test_any_damage_leaves_a_model_or_a_model_error(file: Path, seed: int, count: int) -> None:
    chance, content = random.Random(seed), bytearray(sound("tests"))
    for _ in range(count):
        at = chance.randrange(len(content))
        match chance.randrange(4):
            case 0:
                content[at] = chance.randrange(256)
            case 1:
                content[at] ^= 1 << chance.randrange(8)
            case 2:
                del content[at : at + chance.randrange(1, 30)]
            case _:
                content[at:at] = chance.randbytes(chance.randrange(1, 12))
    code = code_of(file, bytes(content))
    assert code in (None, "model_truncated", "model_rejected")
    if code is None:
        locations = set()
        try:
            tensors = list(tensors_of(onnx.ModelProto.FromString(bytes(content))))
        except Exception:  # noqa: BLE001  (onnx's parser takes less than this one, which goes on to onnxruntime)
            return
        for tensor in tensors:
            locations |= {pair.value for pair in tensor.external_data if pair.key == "location"}
        assert locations <= set(survey(file).external)


def nested(levels: int) -> bytes:
    """A graph in an attribute of a node of a graph in …"""
    content = b""
    for _ in range(levels):
        content = field(1, field(5, field(6, content)))
    return onnx.ModelProto(ir_version=8, opset_import=[{}]).SerializeToString() + field(7, content)


def test_graphs_nest_as_deep_as_parsers_read_and_no_deeper(file: Path) -> None:
    assert code_of(file, nested(20)) is None
    for levels in (30, 1_000, 5_000):
        assert code_of(file, nested(levels)) == "model_rejected"


@pytest.mark.parametrize("extra", [b"\x10", b"\x20", b"\x70"])
def test_a_graph_behind_a_tag_too_long_does_not_hide(file: Path, extra: bytes) -> None:
    """C++ parsers cut a tag to 32 bits: onnxruntime would read the graph that a reader of 64 does not see."""
    hidden = field(7, field(5, outside("w", "../../etc/passwd", False).SerializeToString()))[1:]
    content = model(onnx.GraphProto(name="g"), [], []).SerializeToString()
    assert code_of(file, content + b"\xba\x80\x80\x80" + extra + hidden) == "model_rejected"
    assert look(file, content + b"\x3a" + hidden).external == ["../../etc/passwd"]


def test_a_type_too_large_for_its_field_does_not_hide(file: Path) -> None:
    """Of an int32 its 32 bits are read."""
    tensor = b"\x10\x81\x80\x80\x80\x10" + field(9, np.float32(NAN).tobytes()) + field(8, b"w")
    assert onnx.TensorProto.FromString(tensor).data_type == 1
    content = model(onnx.GraphProto(name="g"), [], []).SerializeToString() + field(7, field(5, tensor))
    assert look(file, content).not_finite == ["w"]


def test_a_location_that_is_no_text_is_refused(file: Path) -> None:
    """It would be one file to us and another to the runtime."""
    (file.parent / "\ufffd").touch()
    content = model(graph([outside("w", "X", False)], [], []), [], []).SerializeToString()
    assert code_of(file, content.replace(b"\x12\x01X", b"\x12\x01\x81")) == "model_rejected"


def test_many_files_of_weights_are_many_and_no_more(file: Path) -> None:
    weights = [outside(f"w{number}", f"weights{number % 20_000}", False) for number in range(40_000)]
    assert len(look(file, model(graph(weights, [], []), [], [])).external) == 20_000


def test_what_cannot_be_opened_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    for name in ("folder.onnx", "none.onnx", "x" * 300):
        with pytest.raises(ModelError) as caught:
            survey(tmp_path / name)
        assert caught.value.code == "model_not_found"


# Where weights may lie


@PLAIN
@given(location=st.one_of(WORDS, st.text("./\\a\0", max_size=6), st.text("x", min_size=250, max_size=300)))
def test_no_location_leads_out_of_the_folder(tmp_path: Path, location: str) -> None:
    file = tmp_path / "inner" / "net.onnx"
    file.parent.mkdir(exist_ok=True)
    (tmp_path / "a").touch()
    (file.parent / "a").touch()
    file.write_bytes(model(graph([outside("w", location, False)], [], []), [], []).SerializeToString())
    try:
        [found] = external_files(file)
    except ModelError as error:
        assert error.code == "external_data"
    else:
        assert found.resolve().parent == file.parent.resolve()
        assert found.name == location
        assert found.is_file()


def test_weights_may_lie_in_the_folder_that_the_file_came_from(tmp_path: Path, file: Path) -> None:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "weights").touch()
    file.write_bytes(model(graph([outside("w", "weights", False)], [], []), [], []).SerializeToString())
    assert external_files(file, beside=tmp_path / "inbox") == [tmp_path / "inbox" / "weights"]
    with pytest.raises(ModelError, match="put the file beside the model"):
        external_files(file)
