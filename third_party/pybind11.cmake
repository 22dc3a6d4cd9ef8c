# pybind11 (BSD-3-Clause), for tokred._native only: reads build facts and launch plans into Python objects. Not vendored:
# it is taken, unmodified, from the Python environment that builds (pyproject.toml pins the range).
find_package(Python 3.9 REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_DIR
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(pybind11 2.13 REQUIRED CONFIG PATHS "${pybind11_DIR}" NO_DEFAULT_PATH)
