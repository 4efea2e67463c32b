"""Libraries that wheels of other packages bring along, as auditwheel puts them: files in a folder `PACKAGE.libs`.

Read from the packages that are installed, for the SBOM and for the tests of NOTICE. What is linked statically, and the
folders of torch and NVIDIA, whose packages are these libraries themselves, are not seen. A library whose licence is not
known here is an error, so that none is left out in silence.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution
from typing import NamedTuple

_X11 = ("libXau", "libxcb", "libxcb-shape", "libxcb-shm", "libxcb-xfixes")
_FFMPEG = ("libavcodec", "libavdevice", "libavfilter", "libavformat", "libavutil", "libswresample", "libswscale")
LICENCES = {
    **dict.fromkeys(_X11, "MIT"),
    # As `av.library_meta` says: built with --enable-version3. With x264 and x265 the whole is under GPL.
    **dict.fromkeys(_FFMPEG, "LGPL-3.0-or-later"),
    **dict.fromkeys(("libbrotlicommon", "libbrotlidec"), "MIT"),
    **dict.fromkeys(("libhogweed", "libnettle", "libgmp", "libunistring"), "LGPL-3.0-or-later OR GPL-2.0-or-later"),
    **dict.fromkeys(("libopencore-amrnb", "libopencore-amrwb"), "Apache-2.0"),
    **dict.fromkeys(("libsharpyuv", "libwebp", "libwebpdemux", "libwebpmux"), "BSD-3-Clause"),
    "libSvtAv1Enc": "BSD-3-Clause-Clear",
    "libasound": "LGPL-2.1-or-later",
    "libavif": "BSD-2-Clause",
    "libdav1d": "BSD-2-Clause",
    "libde265": "LGPL-3.0-or-later",
    "libdrm": "MIT",
    "libfreetype": "FTL OR GPL-2.0-or-later",
    "libgfortran": "GPL-3.0-or-later WITH GCC-exception-3.1",
    "libgnutls": "LGPL-2.1-or-later",
    "libgomp": "GPL-3.0-or-later WITH GCC-exception-3.1",
    "libharfbuzz": "MIT-Modern-Variant",
    "libheif": "LGPL-3.0-or-later",
    "libjpeg": "IJG AND BSD-3-Clause AND Zlib",
    "liblcms2": "MIT",
    "liblzma": "0BSD",
    "libmp3lame": "LGPL-2.0-or-later",
    "libopenjp2": "BSD-2-Clause",
    "libopus": "BSD-3-Clause",
    "libpng16": "libpng-2.0",
    "libquadmath": "LGPL-2.1-or-later",
    "libscipy_openblas64_": "BSD-3-Clause",
    "libtiff": "libtiff",
    "libvmaf": "BSD-2-Clause-Patent",
    "libvpl": "MIT",
    "libvpx": "BSD-3-Clause",
    "libx264": "GPL-2.0-or-later",
    "libx265": "GPL-2.0-or-later",
    "libzstd": "BSD-3-Clause OR GPL-2.0-only",
}
"""SPDX expressions by the name of the library."""


class Library(NamedTuple):
    """A file of a wheel, which is somebody else's library."""

    file: str
    name: str
    licence: str

    @property
    def is_gpl(self) -> bool:
        """Whether what is linked with it is under GPL as a whole: no other licence to choose, and no exception."""
        return self.licence.startswith(("GPL", "AGPL")) and " WITH " not in self.licence and " OR " not in self.licence


def bundled(package: Distribution) -> tuple[Library, ...]:
    """Libraries of an installed package. Raises ValueError for those whose licence is not known."""
    files = [path.name for path in package.files or () if len(path.parts) == 2 and path.parts[0].endswith(".libs")]
    names = {file: re.sub(r"(-[0-9a-f]{8})*\.so[.\d]*$", "", file) for file in sorted(files)}
    if unknown := sorted(set(names.values()) - LICENCES.keys()):
        raise ValueError(f"{package.name} {package.version} bundles {unknown}; name their licences in tools/bundled.py")
    return tuple(Library(file, name, LICENCES[name]) for file, name in names.items())
