"""What zstd makes of a file, alone and as a patch from another; run in an environment of its own.

The patches are what `zstd --patch-from` writes: the old file as a raw-content dictionary, a window over both.
Prints one JSON object with sizes in bytes.
"""

import json
import sys
from pathlib import Path

import zstandard


def patched(base: bytes, target: bytes, level: int) -> int:
    window_log = max(10, (len(base) + len(target)).bit_length())
    settings = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=min(window_log, 27), enable_ldm=True, source_size=len(target)
    )
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    packed = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=settings).compress(target)
    unpacked = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 31).decompress(packed)
    assert unpacked == target
    return len(packed)


base, target = (Path(name).read_bytes() for name in sys.argv[1:])
full = {f"full_{level}": len(zstandard.ZstdCompressor(level=level).compress(target)) for level in (3, 19)}
patches = {f"patch_from_{level}": patched(base, target, level) for level in (3, 19)}
print(json.dumps({**full, **patches}))
