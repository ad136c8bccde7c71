"""Every JAX setting of the tests, in one place; it must run before anything imports `nested_reft`."""

import functools
import gc
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

# These modules alone need no hook: they hold no arrays.
from nested_reft.command import THREADS_PER_DEVICE
from nested_reft.program_cache import cache_directory, drop_old_programs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # less is not worth a file
os.environ.setdefault("NPROC", str(8 * THREADS_PER_DEVICE))  # there are 8 devices

import beartype
import flax.struct
import jax
import jaxlib.version
import jaxtyping
import pytest

# Compiling the small programs of tests would take most of their time. Without optimisations it takes half of that, and
# a tenth by the older of XLA's two code generators, which later versions do not have.
OLDER = " --xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else ""
os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level=0{OLDER}")

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)

_flax_dataclass = flax.struct.dataclass


def _package(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def _checked_dataclass(cls=None, **options):
    """`flax.struct.dataclass` whose fields are checked when our own code fills them with arrays.

    JAX rebuilds the same classes by calling them, with shapes, shardings, placeholders or stacked
    arrays in place of the fields, so jaxtyping's own check of every construction would refuse
    `jax.device_get`, `jax.eval_shape`, `jax.vmap` and most uses of `jax.tree.map`.
    """
    if cls is None:
        return functools.partial(_checked_dataclass, **options)
    cls = _flax_dataclass(cls, **options)
    if cls.__module__.partition(".")[0] == "flax":  # its own classes have hints that not every beartype reads
        return cls
    plain = cls.__init__
    checked = jaxtyping.jaxtyped(plain, typechecker=beartype.beartype)

    @functools.wraps(plain)
    def __init__(self, *args, **kwargs):
        frame = sys._getframe(1)
        # Earlier versions of jaxtyping stand between.
        while frame.f_back is not None and _package(frame) == "jaxtyping":
            frame = frame.f_back
        caller = _package(frame)
        # Static fields, such as a plan's shape, hold whole numbers.
        arrays = all(isinstance(leaf, jax.Array | int) for leaf in jax.tree.leaves((args, kwargs)))
        (checked if arrays and caller not in ("jax", "flax") else plain)(self, *args, **kwargs)

    cls.__init__ = __init__
    cls.__no_type_check__ = True  # tells jaxtyping's import hook that this one is taken care of
    return cls


flax.struct.dataclass = _checked_dataclass
jaxtyping.install_import_hook("nested_reft", "beartype.beartype")


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key; `jax.random.split` or `fold_in` it where a test needs several."""
    return jax.random.key(0)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Only the first process tidies up, before its workers start."""
    if not hasattr(session.config, "workerinput"):
        drop_old_programs(cache_directory())


# Linux lets a process map 65,530 regions of memory, and each compiled program takes about eight.
MOST_REGIONS = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Drops the compiled programs of earlier modules before a process has too many; those on the disk stay.

    A worker that went over the limit of the system would be ended in the middle of a test.
    """
    yield
    regions = Path("/proc/self/maps")
    if regions.exists() and regions.read_bytes().count(b"\n") > MOST_REGIONS:
        jax.clear_caches()
        gc.collect()
