"""One worker process per GPU."""

from __future__ import annotations

from typing import Any

from cluster.local import scheduler_options
from schemas.errors import ResourceError
from schemas.profiles import Profile


def cuda_cluster(profile: Profile) -> Any:
    """A ``LocalCUDACluster``; ``ResourceError`` says what is missing where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        build = f"torch {torch.__version__} (CUDA build: {torch.version.cuda or 'none'})"
        raise ResourceError(
            f"a GPU was asked for, but {build} sees none; use `--cluster local`, or install the driver and a CUDA "
            "build of torch"
        )
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ResourceError(
            f"a GPU was asked for, but dask-cuda cannot be imported ({error}); install it: pip install 'colonnade[gpu]'"
        ) from None
    return LocalCUDACluster(
        n_workers=profile.workers,
        threads_per_worker=1,
        resources={"GPU": 1, "CPU": 1},
        local_directory=str(profile.local_directory) if profile.local_directory else None,
        **scheduler_options(profile),
    )
