"""Simulates Windows on Linux: Python imports this file at startup in every process that has its folder in PYTHONPATH.

Locks and fork are missing, SIGTERM ends a process at once, only files that are open for writing can be flushed, and
opening a file without an encoding is an error. In the folder that the environment variable SIMULATED names, folders
cannot be opened, files in use can be neither renamed nor removed, names ignore case, and some names are forbidden.
"""

import builtins
import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import sys
import unicodedata
import warnings

ROOT = os.path.realpath(os.environ["SIMULATED"]) + "/"
MISSING = ("fcntl", "grp", "pwd", "resource", "termios")
FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*\\]|[. ]$|^(aux|con|nul|prn|com\d|lpt\d)(\.|$)', re.IGNORECASE)

fsync, kill, import_module = os.fsync, os.kill, builtins.__import__


def import_if_present(name, globals=None, *arguments, **options):
    """Hide modules from this package only: others import them because `os.name` is still "posix"."""
    package = (globals or {}).get("__name__", "").partition(".")[0]
    if name in MISSING and package == "mirror_modules":
        raise ModuleNotFoundError(f"No module named {name!r}")
    return import_module(name, globals, *arguments, **options)


def fsync_if_writable(file):
    handle = file if isinstance(file, int) else file.fileno()
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    fsync(handle)


def kill_at_once(pid, number):
    kill(pid, signal.SIGKILL if number == signal.SIGTERM else number)


def as_compared(name):
    return unicodedata.normalize("NFC", name).casefold()


def check_name(path):
    folder, name = os.path.split(path)
    if FORBIDDEN.search(name):
        raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", path)
    for other in os.listdir(folder) if os.path.isdir(folder) else []:
        if other != name and as_compared(other) == as_compared(name):
            raise OSError(errno.EEXIST, f"{other} would be the same file", path)


def files_in_use():
    """The files that this process has open or mapped into memory."""
    handles = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = ["/" + line.rstrip("\n").partition("/")[2] for line in maps if "/" in line]
    return mapped + [os.readlink(handle) for handle in handles if os.path.islink(handle)]


def check_unused(path):
    """Refuse a file that is in use, or a folder with one."""
    path = os.path.realpath(path)
    if any(used == path or used.startswith(path + "/") for used in files_in_use()):
        raise PermissionError(errno.EACCES, "The process cannot access the file because it is in use", path)


def hook(event, arguments):
    """Raise an error where Windows would; Python calls this before each operation."""
    if event in ("os.fork", "os.forkpty"):
        raise OSError(errno.ENOSYS, "there is no fork")
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") or isinstance(arguments[0], int):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if not path.startswith(ROOT):
        return
    if event == "open" and os.path.isdir(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    if event == "os.mkdir" or (event == "open" and arguments[2] & os.O_CREAT):
        check_name(path)
    if event in ("os.rename", "os.remove", "os.rmdir"):
        check_unused(path)
    if event == "os.rename":
        target = os.path.abspath(os.fsdecode(arguments[1]))
        check_name(target)
        check_unused(target)


os.fsync, os.kill, builtins.__import__ = fsync_if_writable, kill_at_once, import_if_present
for method in ("fork", "forkserver"):
    del multiprocessing.context._concrete_contexts[method]
multiprocessing.set_start_method("spawn")
# Without this, shutil opens folders.
shutil._use_fd_functions = False
# With PYTHONWARNDEFAULTENCODING, Python warns of files that are opened without an encoding.
warnings.filterwarnings("error", category=EncodingWarning, module="mirror_modules")
sys.addaudithook(hook)
