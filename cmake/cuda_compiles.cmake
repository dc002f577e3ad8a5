# Whether this nvcc takes the CUDA sources; sets cuda_state to the reason if not. Tried once for each state of the
# sources, to PTX only, which finds all but an assembler's complaint.
file(GLOB cuda_headers CONFIGURE_DEPENDS csrc/cuda/*.cuh csrc/cuda/*.h csrc/common/*.h)
set(fingerprint "${CMAKE_CUDA_COMPILER_VERSION}")
foreach(source ${cuda_sources} ${cuda_headers})
  file(SHA256 ${source} hash)
  string(APPEND fingerprint ${hash})
endforeach()
string(SHA256 fingerprint "${fingerprint}")
string(SUBSTRING ${fingerprint} 0 12 fingerprint)

set(kernels ${cuda_sources})
list(FILTER kernels INCLUDE REGEX "\\.cu$")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
# CMake hands a CUDA-only try_compile no ranlib, and its link of a static library then runs an empty command.
try_compile(RLHF_CUDA_COMPILES_${fingerprint} ${CMAKE_BINARY_DIR}/cuda_compiles SOURCES ${kernels}
            CMAKE_FLAGS "-DCMAKE_CUDA_ARCHITECTURES=80-virtual" "-DCMAKE_RANLIB=${CMAKE_RANLIB}" "-DCMAKE_AR=${CMAKE_AR}"
            CUDA_STANDARD 17 OUTPUT_VARIABLE output)
unset(CMAKE_TRY_COMPILE_TARGET_TYPE)
if(NOT RLHF_CUDA_COMPILES_${fingerprint})
  set(cuda_state "nvcc ${CMAKE_CUDA_COMPILER_VERSION} did not compile the CUDA sources, see the log of the build")
  message(WARNING "${output}")
endif()
