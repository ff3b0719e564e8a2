"""Exchanging what two paths name, in one step, where the system can.

Called by `writer`. Python has no function for it: Linux has `renameat2`, macOS `renamex_np`, both in the C library.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux, <linux/fs.h>
_RENAME_SWAP = 2  # macOS, <sys/stdio.h>
# The kernel, the file system or the file server does not know how; EXDEV is how some layered file systems say so.
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}


def exchange(first: Path, second: Path) -> bool:
    """Let two existing paths on one file system change places: at no instant is either of them missing.

    Args:
        first: a file or a directory.
        second: the same.

    Returns:
        False if the system cannot do that; nothing has changed then.

    Raises:
        OSError: any other failure, such as a path that is not there.
    """
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _system_call():
    """Give the function (first, second) -> 0 or -1 of this system, or None."""
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        return lambda first, second: library.renamex_np(first, second, ctypes.c_uint(_RENAME_SWAP))
    try:
        rename = library.renameat2
    except AttributeError:  # a C library older than glibc 2.28, or musl
        return None
    here = ctypes.c_int(_AT_FDCWD)
    return lambda first, second: rename(here, first, here, second, ctypes.c_uint(_RENAME_EXCHANGE))
