import os
import pickle
import pickletools

import numpy as np
import pytest

from mirror_modules.data.safe_pickle import read_pickle


def written(tmp_path, content):
    path = tmp_path / "some.pickle"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(tmp_path, protocol):
    content = [("a/b", "c"), {1: "é한", "x": [None, True, 2**70, 1.5]}, {3, 4}, frozenset({5}), b"\xff\x00", ""]
    assert read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol))) == content


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        np.int64(-7),
        np.uint8(200),
        np.float32(1.5),
        np.bool_(True),
        np.str_("é한"),
        np.bytes_(b"x"),
        np.dtype(">i4").type(9),
    ],
    ids=str,
)
def test_numpy_scalars_become_plain(tmp_path, protocol, value):
    result = read_pickle(written(tmp_path, pickle.dumps([value], protocol=protocol)))
    assert result == [value.item()]
    assert type(result[0]) is type(value.item())


def test_numpy_scalars_of_the_other_byte_order(tmp_path):
    dtype = b"(cnumpy\ndtype\n(S'i4'\nI0\nI1\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb"
    scalar = b"cnumpy.core.multiarray\nscalar\n" + dtype + b"S'\\x00\\x00\\x01\\x00'\ntR."
    assert read_pickle(written(tmp_path, scalar)) == 256


def test_strings_of_python_2_are_read_as_latin_1(tmp_path):
    content = b"\x80\x02]q\x00(U\x05caf\xe9!X\x03\x00\x00\x00\xed\x95\x9ce."
    assert read_pickle(written(tmp_path, content)) == ["café!", "한"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_else_is_called(tmp_path, protocol):
    trap = tmp_path / "trap"
    path = written(tmp_path, pickle.dumps(["fine", Malicious(trap)], protocol=protocol))
    with pytest.raises(ValueError, match=r"some\.pickle asks for the global (posix|nt)\.mkdir; only lists, tuples"):
        read_pickle(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("builtins", "set.__init__"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("copy_reg", "_reconstructor"),
        ("_codecs", "decode"),
        ("torch", "load"),
    ],
)
def test_forbidden_globals_are_named(tmp_path, module, name):
    by_line = f"c{module}\n{name}\n.".encode()
    by_stack = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name)) + b"\x93."
    for content in (by_line, by_stack):
        with pytest.raises(ValueError, match=f"asks for the global {module}.{name};.*unless you trust whoever made it"):
            read_pickle(written(tmp_path, content))


@pytest.mark.parametrize("value", [np.arange(3), np.datetime64("2020"), np.complex64(1), range(3)], ids=repr)
def test_other_values_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"some\.pickle (asks for the global|is damaged)"):
        read_pickle(written(tmp_path, pickle.dumps(value, protocol=2)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2, 3])[:-4],
        b"\x80\x02r\xff\xff\xff\x7f.",  # remembers nothing under a number that takes gigabytes
        b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.",  # 64 GiB of bytes
        b"\x80\x02Pnobody\n.",  # a persistent id
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
    ],
    ids=range(8),
)
def test_damaged_files_are_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"some\.pickle is damaged: it is no pickle of plain data \(.+\)"):
        read_pickle(written(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([shared := [1, 2], shared], protocol=2),
        b"\x80\x02)\x85q\x000h\x00h\x00\x86.",  # a tuple, remembered after its making
        b"\x80\x02)\x85X\x01\x00\x00\x00x0q\x000h\x00.",  # text is made and thrown away before
        b"\x80\x02]" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"K\x01s.",
    ],
    ids=range(4),
)
def test_what_is_shared_could_grow_without_end(tmp_path, content):
    with pytest.raises(ValueError, match=r"damaged: .* \(a list, tuple or dict stands at several places in it\)"):
        read_pickle(written(tmp_path, content))


def test_text_and_numbers_may_be_shared(tmp_path):
    word, number = "word", np.int64(7)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = [{1: word}, {word: 1}, number, number, np.int64(8)]
        assert read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol))) == content


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", b"\x80\x02}K\x01" + b"\x85" * 10**6 + b"K\x01s."],
    ids=["lists", "tuples"],
)
def test_what_is_nested_too_deep_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"damaged: .* \(it is nested more than 100 deep\)"):
        read_pickle(written(tmp_path, content))


def test_long_lists_are_not_deep(tmp_path):
    content = [list(range(3000)), {i: str(i) for i in range(3000)}]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol))) == content


def test_sets_of_tuples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a set in it holds more than text and numbers"):
        read_pickle(written(tmp_path, pickle.dumps({(1, 2)}, protocol=2)))


@pytest.mark.parametrize("name", ["numpy.core.multiarray\nscalar", "numpy\ndtype", "_codecs\nencode", "builtins\nset"])
@pytest.mark.parametrize("state", [b"}", b"N}X\x0c\0\0\0__defaults__K\x01K\x02\x86s\x86"], ids=["state", "slots"])
def test_what_is_called_keeps_its_defaults(tmp_path, name, state):
    with pytest.raises(ValueError, match=r"damaged: .* .it gives a function a state"):
        read_pickle(written(tmp_path, b"\x80\x02c" + name.encode() + b"\n" + state + b"b."))
    assert read_pickle(written(tmp_path, pickle.dumps(np.int64(7), protocol=2))) == 7


@pytest.mark.parametrize(
    "content", [b"cnumpy\ndtype\n.", b"(lcnumpy\ndtype\n(S'i4'\ntRa.", b"(dI1\nc_codecs\nencode\ns."]
)
def test_what_is_left_of_numpy_is_no_data(tmp_path, content):
    with pytest.raises(ValueError, match=r"damaged: .* .it holds something of type _(Call|ScalarType)"):
        read_pickle(written(tmp_path, content))


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "nowhere.pickle")


def test_flipped_bits_are_read_or_refused(tmp_path):
    whole = bytearray(pickle.dumps([{"a": [1, 2.5, "x"]}, np.int64(3), b"y", {4}], protocol=2))
    assert len(list(pickletools.genops(bytes(whole)))) > 20
    complaints = []
    for bit in range(0, 8 * len(whole), 7):
        whole[bit // 8] ^= 1 << bit % 8
        try:
            read_pickle(written(tmp_path, whole))
        except ValueError as error:
            complaints.append(str(error))
        whole[bit // 8] ^= 1 << bit % 8
    assert len(complaints) > 50
    assert all("some.pickle" in complaint for complaint in complaints)
