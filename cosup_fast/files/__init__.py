"""Files that are whole or absent, manifests and checksums by which damage is noticed, journals of long work, locks."""

from cosup_fast.files.checked import read_checked, write_checked
from cosup_fast.files.journal import Journal
from cosup_fast.files.manifest import check_manifest, described, write_manifest
from cosup_fast.files.whole import (
    FolderKind,
    check_regular,
    check_replaceable,
    check_writable,
    held,
    install_folder,
    load_array,
    locked,
    naming,
    open_new,
    read_object,
    remove_unfinished,
    remove_unwritten,
    replace_file,
    replace_folder,
    save_array,
    sha256,
    sync,
    usual_mode,
)

__all__ = [
    "FolderKind",
    "Journal",
    "check_manifest",
    "check_regular",
    "check_replaceable",
    "check_writable",
    "described",
    "held",
    "install_folder",
    "load_array",
    "locked",
    "naming",
    "open_new",
    "read_checked",
    "read_object",
    "remove_unfinished",
    "remove_unwritten",
    "replace_file",
    "replace_folder",
    "save_array",
    "sha256",
    "sync",
    "usual_mode",
    "write_checked",
    "write_manifest",
]
