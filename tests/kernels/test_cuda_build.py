"""ess_kernels.cuda_build: what it asks of the machine and says where that is missing."""

import pytest

from ess_kernels import cuda_build


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="must be one of plan_fetch: got 'scatter'"):
        cuda_build.build("scatter", "9.0a")


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="nvcc must be there.*Install the CUDA 13") as error:
        cuda_build.build("plan_fetch", "9.0a")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", None])
def test_where_nvcc_is_found(monkeypatch, tmp_path, variable):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    else:
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cuda_build.nvcc() == tmp_path / "bin" / "nvcc"
