"""Pickles of plain data are read; everything else is refused, without running code or exhausting memory and time."""

import copyreg
import os
import pickle
import pickletools
import struct
import tracemalloc

import numpy as np
import pytest

from mirror_modules.data.readers.safe_pickle import read_pickle


def written(tmp_path, content):
    path = tmp_path / "some.pickle"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_survives_the_round_trip(tmp_path, protocol):
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
def test_numpy_scalars_become_python_scalars(tmp_path, protocol, value):
    result = read_pickle(written(tmp_path, pickle.dumps([value], protocol=protocol)))
    assert result == [value.item()]
    assert type(result[0]) is type(value.item())


def test_numpy_scalars_of_the_other_byte_order(tmp_path):
    dtype = b"(cnumpy\ndtype\n(S'i4'\nI0\nI1\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb"
    scalar = b"cnumpy.core.multiarray\nscalar\n" + dtype + b"S'\\x00\\x00\\x01\\x00'\ntR."
    assert read_pickle(written(tmp_path, scalar)) == 256


def test_python_2_strings_are_decoded_as_latin_1(tmp_path):
    content = b"\x80\x02]q\x00(U\x05caf\xe9!X\x03\x00\x00\x00\xed\x95\x9ce."
    assert read_pickle(written(tmp_path, content)) == ["café!", "한"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_other_function_is_called(tmp_path, protocol):
    trap = tmp_path / "trap"
    path = written(tmp_path, pickle.dumps(["fine", Malicious(trap)], protocol=protocol))
    with pytest.raises(ValueError, match=r"some\.pickle requests the global (posix|nt)\.mkdir; only lists, tuples"):
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
        with pytest.raises(ValueError, match=f"requests the global {module}.{name};.*unless you trust its author"):
            read_pickle(written(tmp_path, content))


def test_registered_extensions_are_refused(tmp_path):
    """They name a global by a number, which pickle may resolve from a cache."""
    copyreg.add_extension("os", "system", 240)
    try:
        for content in (b"\x80\x02\x82\xf0.", b"\x80\x02\x83\xf0\x00.", b"\x80\x02\x84\xf0\x00\x00\x00."):
            pickle.loads(content)  # fills the cache
            with pytest.raises(ValueError, match=r"damaged: .* \(it uses a registered extension\)"):
                read_pickle(written(tmp_path, content))
    finally:
        copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize("value", [np.arange(3), np.datetime64("2020"), np.complex64(1), range(3)], ids=repr)
def test_other_values_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"some\.pickle (requests the global|is damaged)"):
        read_pickle(written(tmp_path, pickle.dumps(value, protocol=2)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOFError"),
        (b"no pickle", "KeyError: 110"),
        (pickle.dumps([1, 2, 3])[:-4], "EOFError"),
        (b"\x80\x02Pnobody\n.", "persistent id"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "bytes in the encoding 'rot13'"),
        (b"cnumpy\ndtype\n(S'O'\ntR.", "a numpy scalar of type 'O'"),
    ],
    ids=["empty", "text", "truncated", "persistent id", "encoding", "object dtype"],
)
def test_damaged_files_are_named(tmp_path, content, reason):
    message = rf"some\.pickle is damaged: it is not a pickle of plain data \(.*{reason}.*\)"
    with pytest.raises(ValueError, match=message):
        read_pickle(written(tmp_path, content))


# Attacks: small files that demand memory or time without bound.


@pytest.mark.parametrize("size", [2**32 - 1, 2**36 - 1])
@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e", b"\x96"], ids=["text", "bytes", "bytearray"])
def test_declared_sizes_are_not_allocated(tmp_path, opcode, size):
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"some\.pickle is damaged"):
        read_pickle(written(tmp_path, b"\x80\x05" + opcode + struct.pack("<Q", size) + b"x."))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("content", [b"\x80\x02Nr\xff\xff\xff\x7f.", b"Np2000000000\n."], ids=["binary", "text"])
def test_a_huge_memo_index_allocates_nothing(tmp_path, content):
    """The C unpickler's memo is an array: it would grow to 32 GiB."""
    tracemalloc.start()
    assert read_pickle(written(tmp_path, content)) is None
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


DEEP = b")" + b"\x85" * 200_000
DOUBLING = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))


@pytest.mark.parametrize("nested", [DEEP, DOUBLING], ids=["200,000 deep", "doubled 60 times"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"}", b"Ns"),
        (b"}(", b"Nu"),
        (b"(", b"Nd"),
        (b"\x8f(", b"\x90"),
        (b"(", b"\x91"),
        (b"c__builtin__\nset\n(](", b"etR"),
        (b"c__builtin__\nfrozenset\n(](", b"etR"),
    ],
    ids=["setitem", "setitems", "dict", "additems", "frozenset opcode", "set", "frozenset"],
)
def test_nested_tuples_are_never_hashed(tmp_path, before, nested, after):
    """Their hash overflows the C stack, or takes 2^60 steps."""
    with pytest.raises(ValueError, match=r"damaged: .* \(a dict key or set member is neither a number nor text\)"):
        read_pickle(written(tmp_path, b"\x80\x04" + before + nested + after + b"."))


def test_sets_of_tuples_are_refused(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(ValueError, match="a dict key or set member is neither a number nor text"):
            read_pickle(written(tmp_path, pickle.dumps({(1, 2)}, protocol=protocol)))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([shared := [1, 2], shared], protocol=2),
        b"\x80\x02]K\x01a2\x86.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02" + DOUBLING + b".",
        b"\x80\x02]" + b"".join(b"q%c0](h%ch%ce" % (i, i, i) for i in range(60)) + b".",
    ],
    ids=["list", "duplicate", "cycle", "nested tuples", "nested lists"],
)
def test_containers_referenced_twice_are_refused(tmp_path, content):
    """A loop over 60 lists, each of which holds the previous one twice, would take 2^60 steps."""
    with pytest.raises(ValueError, match=r"damaged: .* \(a container is referenced twice\)"):
        read_pickle(written(tmp_path, content))


def test_text_numbers_and_empty_containers_may_be_shared(tmp_path):
    word, number = "word", np.int64(7)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = [{1: word}, {word: 1}, number, number, np.int64(8), (), ()]
        assert read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol))) == content


def call_repeatedly(function, *arguments):
    """A pickle of 100,000 results of one call, which holds the arguments once."""
    make_tuple = {1: b"\x85", 2: b"\x86"}[len(arguments)]
    stored = b"".join(argument + b"q%c0" % (i + 1) for i, argument in enumerate(arguments))
    call = b"h\x00" + b"".join(b"h%c" % (i + 1) for i in range(len(arguments))) + make_tuple + b"R"
    return b"\x80\x02](c" + function + b"\nq\x000" + stored + call * 10**5 + b"e."


@pytest.mark.parametrize(
    "content",
    [
        call_repeatedly(b"_codecs\nencode", b"X" + struct.pack("<I", 10**6) + b"a" * 10**6, b"X\x06\0\0\0latin1"),
        call_repeatedly(
            b"__builtin__\nset", b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(50_000)) + b"e"
        ),
        call_repeatedly(
            b"numpy.core.multiarray\nscalar",
            b"cnumpy\ndtype\nX\x05\0\0\0U9999\x85R",
            b"X" + struct.pack("<I", 39_996) + b"a\0\0\0" * 9999,
        ),
    ],
    ids=["bytes", "sets", "numpy strings"],
)
def test_repeated_calls_on_one_argument_are_limited(tmp_path, content):
    """Without a limit these files of about a megabyte would hold 93 GiB, 5 billion numbers and 0.9 GiB."""
    with pytest.raises(ValueError, match=r"damaged: .* \(its calls copy far more than it holds\)"):
        read_pickle(written(tmp_path, content))


def test_many_numpy_scalars_stay_below_the_limit(tmp_path):
    content = [
        *map(np.int64, range(3000)),
        *(np.str_(f"{i}") for i in range(300)),
        *(bytes([i]) * 9 for i in range(99)),
    ]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol))) == content


@pytest.mark.parametrize(
    "content",
    [b"]" * 10**5 + b"a" * (10**5 - 1), b"}K\x00" * 10**5 + b"N" + b"s" * 10**5, b")" + b"\x85" * 10**5],
    ids=["lists", "dicts", "tuples"],
)
def test_deep_values_are_harmless(tmp_path, content):
    value, depth = read_pickle(written(tmp_path, b"\x80\x02" + content + b".")), 0
    while value:
        value, depth = value[0], depth + 1
    assert depth >= 10**5 - 1


# Tampering with the permitted functions.


@pytest.mark.parametrize("name", ["numpy.core.multiarray\nscalar", "numpy\ndtype", "_codecs\nencode", "builtins\nset"])
@pytest.mark.parametrize("state", [b"}", b"N}X\x0c\0\0\0__defaults__K\x01K\x02\x86s\x86"], ids=["state", "slots"])
def test_permitted_functions_cannot_be_changed(tmp_path, name, state):
    with pytest.raises(ValueError, match=r"damaged: .* .it gives a function a state"):
        read_pickle(written(tmp_path, b"\x80\x02c" + name.encode() + b"\n" + state + b"b."))
    assert read_pickle(written(tmp_path, pickle.dumps(np.int64(7), protocol=2))) == 7


@pytest.mark.parametrize(
    "content", [b"cnumpy\ndtype\n.", b"(lcnumpy\ndtype\n(S'i4'\ntRa.", b"(dI1\nc_codecs\nencode\ns."]
)
def test_permitted_functions_are_no_data(tmp_path, content):
    with pytest.raises(ValueError, match=r"damaged: .* .it holds an object of type _(Call|ScalarType)"):
        read_pickle(written(tmp_path, content))


def test_a_missing_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "nowhere.pickle")


def test_flipped_bits_are_read_or_refused(tmp_path):
    content = bytearray(pickle.dumps([{"a": [1, 2.5, "x"]}, np.int64(3), b"y", {4}], protocol=2))
    assert len(list(pickletools.genops(bytes(content)))) > 20
    errors = []
    for bit in range(0, 8 * len(content), 7):
        content[bit // 8] ^= 1 << bit % 8
        try:
            read_pickle(written(tmp_path, content))
        except ValueError as error:
            errors.append(str(error))
        content[bit // 8] ^= 1 << bit % 8
    assert len(errors) > 50
    assert all("some.pickle" in error for error in errors)
