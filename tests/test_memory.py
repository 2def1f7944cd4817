"""What cannot fit into memory is told before the system kills the process."""

import pytest

from unept.memory import BYTES_A_PIXEL, require_memory


def test_an_image_that_cannot_be_seen_whole_is_refused_with_advice(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 9000000 kB\nMemAvailable:    {BYTES_A_PIXEL} kB\n")
    require_memory(1024, "with a.png: --window 512", meminfo)
    with pytest.raises(MemoryError, match=r"^out of memory with a\.png: --window 512$"):
        require_memory(1025, "with a.png: --window 512", meminfo)
    require_memory(10**12, "where nothing is known", tmp_path / "absent")
