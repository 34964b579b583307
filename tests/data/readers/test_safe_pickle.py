"""Pickles of plain data are read; everything else is refused, without running code or exhausting memory and time."""

import copyreg
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from mirror_modules.data.readers.safe_pickle import PickledDict, read_pickle


def written(tmp_path, content):
    path = tmp_path / "some.pickle"
    path.write_bytes(content)
    return path


def with_dicts(value):
    """The value with a dict for each `PickledDict`."""
    if isinstance(value, PickledDict):
        return {key: with_dicts(each) for key, each in value.items()}
    return type(value)(map(with_dicts, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_survives_the_round_trip(tmp_path, protocol):
    content = [("a/b", "c"), {1: "é한", "x": [None, True, 2**70, 1.5]}, {}, b"\xff\x00", "", b""]
    assert with_dicts(read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol)))) == content


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_sets_become_lists(tmp_path, protocol):
    content = [{3}, {(1, 2)}, frozenset({5}), frozenset({"x"}), set(), frozenset()]
    result = read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol)))
    assert result == [[3], [(1, 2)], [5], ["x"], [], []]


def test_items_of_a_dict_keep_their_order_and_repetitions(tmp_path):
    for content in (b"(I5\nVa\nI3\nVb\nI5\nVc\nd.", b"}(K\x05\x8c\x01aK\x03\x8c\x01bK\x05\x8c\x01cu."):
        result = read_pickle(written(tmp_path, content))
        assert result.items() == [(5, "a"), (3, "b"), (5, "c")]
        assert len(result) == 3


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        np.int64(-7),
        np.uint8(200),
        np.float32(1.5),
        np.bool_(True),
        np.str_("é한"),
        np.str_(""),
        np.str_("x" * 10_000),
        np.bytes_(b"x"),
        np.bytes_(b""),
        np.dtype(">i4").type(9),
    ],
    ids=lambda value: f"{value.dtype} {value!s:.9}",
)
def test_numpy_scalars_become_python_scalars(tmp_path, protocol, value):
    result = read_pickle(written(tmp_path, pickle.dumps([value], protocol=protocol)))
    assert result == [value.item()]
    assert type(result[0]) is type(value.item())


def test_numpy_scalars_of_the_other_byte_order(tmp_path):
    dtype = b"(cnumpy\ndtype\n(S'i4'\nI0\nI1\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb"
    scalar = b"cnumpy.core.multiarray\nscalar\n" + dtype + b"S'\\x00\\x00\\x01\\x00'\ntR."
    assert read_pickle(written(tmp_path, scalar)) == 256


def test_empty_numpy_strings_of_python_2(tmp_path):
    for code, empty in (("S0", b""), ("U0", "")):
        dtype = f"(cnumpy\ndtype\n(S'{code}'\nI0\nI1\ntR(I3\nS'<'\nNNNI0\nI1\nI0\ntb".encode()
        scalar = b"cnumpy.core.multiarray\nscalar\n" + dtype + b"S''\ntR."
        assert read_pickle(written(tmp_path, scalar)) == empty


def test_memo_indices_with_gaps(tmp_path):
    """Python 2 counts from 1, and its `pickletools.optimize` drops unused indices without renumbering."""
    assert read_pickle(written(tmp_path, b"(lp1\nVa\np7\nag7\na.")) == ["a", "a"]


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
        ("builtins", "bytearray"),
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
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "bytes in an encoding other than Latin-1"),
        (b"c__builtin__\nbytes\n(I9\ntR.", "TypeError: _empty_bytes"),
        (b"(lp1\ng0\na.", "it holds an object of type ellipsis"),
        (b"(lp1\ng2\na.", "IndexError"),
        (b"}Na.", "AttributeError: 'PickledDict'"),
        (b"(I1\nd.", "zip"),
        (b"cnumpy\ndtype\n(S'O'\ntR.", "a numpy scalar of type 'O'"),
    ],
    ids=[
        "empty",
        "text",
        "truncated",
        "persistent id",
        "encoding",
        "bytes",
        "memo gap",
        "memo end",
        "append to dict",
        "odd dict",
        "object dtype",
    ],
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
    with pytest.raises(ValueError, match=r"damaged: .* \(a memo index of 2\d{9} in a file of \d+ bytes\)"):
        read_pickle(written(tmp_path, content))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


DEEP = b")" + b"\x85" * 200_000
DOUBLING = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))


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
def test_nested_tuples_are_never_hashed(tmp_path, before, after):
    """Their hash overflows the C stack, or takes 2^60 steps."""
    assert len(read_pickle(written(tmp_path, b"\x80\x04" + before + DEEP + after + b"."))) == 1
    with pytest.raises(ValueError, match=r"damaged: .* \(a container is referenced twice\)"):
        read_pickle(written(tmp_path, b"\x80\x04" + before + DOUBLING + after + b"."))


def test_messages_are_short_and_printable(tmp_path):
    """The repr of the nested tuple has 2^60 characters."""
    for content in (
        b"c_codecs\nencode\n(Vx\n" + DOUBLING + b"tR.",
        b"c" + b"a" * 10**6 + b"\nx\n.",
        b"cnumpy\ndtype\n(V" + b"a" * 10**6 + b"\ntR.",
        b"\x80\x04\x8c\x03\xed\xa0\x80\x8c\x01x\x93.",
    ):
        with pytest.raises(ValueError, match=r"some\.pickle (requests the global|is damaged)") as caught:
            read_pickle(written(tmp_path, content))
        assert len(str(caught.value).encode()) < 500 + len(str(tmp_path))


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
        content = [{1: word}, {word: 1}, number, number, np.int64(8), (), (), empty := {}, empty]
        assert with_dicts(read_pickle(written(tmp_path, pickle.dumps(content, protocol=protocol)))) == content


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
            b"numpy.core.multiarray\nscalar",
            b"cnumpy\ndtype\nX\x05\0\0\0U9999\x85R",
            b"X" + struct.pack("<I", 39_996) + b"a\0\0\0" * 9999,
        ),
    ],
    ids=["bytes", "numpy strings"],
)
def test_repeated_calls_on_one_argument_are_limited(tmp_path, content):
    """Without a limit these files of about a megabyte would hold 93 GiB and 0.9 GiB."""
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
        value, depth = value.items()[0][1] if isinstance(value, PickledDict) else value[0], depth + 1
    assert depth >= 10**5 - 1


def long_integer(number):
    content = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(content)) + content


def colliding_keys(bits):
    """Integers that fill two thirds of a dict of 2**bits slots, and one more whose search visits most of them."""
    size, slots = 2**bits, [0]
    while len(slots) < 2 * size // 3 - 5:
        slots.append((5 * slots[-1] + 1) % size)  # the order in which a dict searches
    filled = set(slots)

    def visits(key):
        slot, rest, count = key % size, key, 0
        while slot in filled and count < len(slots):
            rest >>= 5
            slot, count = (5 * slot + rest + 1) % size, count + 1
        return count

    return slots, next(key for key in range(size, 2**31, size // 7) if visits(key) > len(slots) // 2)


def slow_pickles():
    """Files of 100 to 1000 kB which would take 20 seconds or more."""
    multiples = [k * (2**61 - 1) for k in range(60_000)]  # the hash of each is 0
    yield b"}(" + b"".join(long_integer(key) + b"N" for key in multiples) + b"u."
    yield b"\x8f(" + b"".join(map(long_integer, multiples)) + b"\x90."
    yield b"c__builtin__\nset\n](" + b"".join(map(long_integer, multiples)) + b"e\x85R."
    # One integer of 300 kB, whose hash is not cached.
    yield long_integer(2**2_400_000) + b"q\x000}(" + b"h\x00N" * 200_000 + b"u."
    keys, last = colliding_keys(17)
    packed = [b"J" + struct.pack("<i", key) for key in (*keys, last)]
    yield b"}(" + b"".join(key + b"N" for key in packed) + b"u(" + (packed[-1] + b"N") * 100_000 + b"u."
    # The same among memo indices.
    yield b"N" + b"".join(b"p%d\n" % index for index in multiples) + b"."
    yield b"N" + b"".join(b"r" + key[1:] for key in packed) + (b"j" + packed[-1][1:] + b"0") * 100_000 + b"."
    # A call whose 200,000 arguments are stored once.
    arguments = b"(X\x02\0\0\0i4" + b"N" * 200_000 + b"lq\x010"
    yield b"cnumpy\ndtype\nq\x000" + arguments + b"h\x00h\x01R0" * 3000 + b"N."


READ_WITH_LIMITS = """
import resource, sys
from pathlib import Path
from mirror_modules.data.readers.safe_pickle import read_pickle
if sys.platform == "linux":
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory + 2**29, resource.getrlimit(resource.RLIMIT_AS)[1]))
for path in map(Path, sys.argv[1:]):
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    print(path, flush=True)
    try:
        read_pickle(path)
    except ValueError as error:
        assert "MemoryError" not in str(error), error
"""


def test_time_is_proportional_to_the_size(tmp_path):
    """Ten seconds of CPU time and 512 MiB for each file."""
    pytest.importorskip("resource")
    paths = [tmp_path / f"{i}.pickle" for i, _ in enumerate(slow_pickles())]
    for path, content in zip(paths, slow_pickles()):
        path.write_bytes(b"\x80\x04" + content)
        assert 10**5 < path.stat().st_size < 2 * 10**6
    command = [sys.executable, "-c", READ_WITH_LIMITS, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# Tampering with the permitted functions.


@pytest.mark.parametrize("name", ["numpy.core.multiarray\nscalar", "numpy\ndtype", "_codecs\nencode", "builtins\nset"])
@pytest.mark.parametrize("state", [b"}", b"N}X\x0c\0\0\0__defaults__K\x01K\x02\x86s\x86"], ids=["state", "slots"])
def test_permitted_functions_cannot_be_changed(tmp_path, name, state):
    with pytest.raises(ValueError, match=r"damaged: .* .it sets the state of an object of type _Call"):
        read_pickle(written(tmp_path, b"\x80\x02c" + name.encode() + b"\n" + state + b"b."))
    with pytest.raises(ValueError, match=r"damaged: .* .it sets the state of an object of type PickledDict"):
        read_pickle(written(tmp_path, b"\x80\x02}N}X\x06\0\0\0_itemsK\x01s\x86b."))
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
