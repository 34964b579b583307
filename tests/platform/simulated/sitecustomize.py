"""Simulates Windows on Linux in this process and its children: Python imports this file from PYTHONPATH at startup.

There is no fcntl, processes are spawned and not forked, files that are open elsewhere cannot be replaced, and so on; the
rules about files apply within the folder that the environment variable SIMULATED names.
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
FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*\\]|[. ]$|^(aux|con|nul|prn|com\d|lpt\d)(\.|$)', re.IGNORECASE)

for method in ("fork", "forkserver"):
    del multiprocessing.context._concrete_contexts[method]
multiprocessing.set_start_method("spawn")
shutil._use_fd_functions = False
# With PYTHONWARNDEFAULTENCODING, a file opened without an encoding, which would be that of the system, is an error.
warnings.filterwarnings("error", category=EncodingWarning, module="mirror_modules")

fsync, kill, import_module = os.fsync, os.kill, builtins.__import__


def import_elsewhere(name, globals=None, *arguments, **options):
    """Hide modules from this package; others import them, since `os.name` is still "posix"."""
    if name in ("fcntl", "grp", "pwd", "resource", "termios") and (globals or {}).get("__name__", "").startswith("mirror"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return import_module(name, globals, *arguments, **options)


def fsync_if_writable(file):
    handle = file if isinstance(file, int) else file.fileno()
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    fsync(handle)


def terminate(pid, number):
    """There is no SIGTERM between processes."""
    kill(pid, signal.SIGKILL if number == signal.SIGTERM else number)


os.fsync, os.kill, builtins.__import__ = fsync_if_writable, terminate, import_elsewhere


def same_name(name):
    return unicodedata.normalize("NFC", name).casefold()


def check_name(path):
    folder, name = os.path.split(path)
    if FORBIDDEN.search(name):
        raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", path)
    for other in os.listdir(folder) if os.path.isdir(folder) else []:
        if other != name and same_name(other) == same_name(name):
            raise OSError(errno.EEXIST, f"{other} would be the same file", path)


def check_closed(path):
    """Refuse to rename or to remove a file that this process has open or mapped into memory, or a folder with one."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    in_use = {os.readlink(link) for link in links if os.path.islink(link)}
    with open("/proc/self/maps", encoding="utf-8") as maps:
        in_use.update(line.rstrip("\n").partition("/")[2] and "/" + line.rstrip("\n").partition("/")[2] for line in maps)
    path = os.path.realpath(path)
    if any(each == path or each.startswith(path + "/") for each in in_use):
        raise PermissionError(errno.EACCES, "The process cannot access the file because it is in use", path)


def hook(event, arguments):
    """Raise an error where Windows would."""
    if event in ("os.fork", "os.forkpty"):
        raise OSError(errno.ENOSYS, "there is no fork")
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") or isinstance(arguments[0], int):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if not path.startswith(ROOT):
        return
    if event == "open":
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        if arguments[2] & os.O_CREAT:
            check_name(path)
    elif event == "os.mkdir":
        check_name(path)
    else:
        check_closed(path)
        if event == "os.rename":
            target = os.path.abspath(os.fsdecode(arguments[1]))
            check_name(target)
            check_closed(target)


sys.addaudithook(hook)
