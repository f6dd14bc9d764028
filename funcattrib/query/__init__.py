from funcattrib.query.faiss_index import FaissConfig, FaissIndex, build_or_load, search
from funcattrib.query.topk import TopK, store_blocks, topk

__all__ = ["FaissConfig", "FaissIndex", "TopK", "build_or_load", "search", "store_blocks", "topk"]
