"""The gradient store: shards of rows on disk, each written by one process, resumed after a kill, read memory-mapped."""

from funcattrib.store.create import create_store
from funcattrib.store.encode import decode, encode
from funcattrib.store.layout import FileFacts, LeafColumns, Shard, lay_out
from funcattrib.store.manifest import SCORE_CONVENTION, Manifest, differences, identity, read_manifest
from funcattrib.store.matrix import LazyMatrix
from funcattrib.store.merge import merge_stores
from funcattrib.store.multi_process import require_shared, share_store
from funcattrib.store.reader import GradientStore, open_store
from funcattrib.store.verify import verify
from funcattrib.store.writer import StoreWriter

__all__ = [
    "SCORE_CONVENTION",
    "FileFacts",
    "GradientStore",
    "LazyMatrix",
    "LeafColumns",
    "Manifest",
    "Shard",
    "StoreWriter",
    "create_store",
    "decode",
    "differences",
    "encode",
    "identity",
    "lay_out",
    "merge_stores",
    "open_store",
    "read_manifest",
    "require_shared",
    "share_store",
    "verify",
]
