# weft_library(name SOURCES a.cc ... DEPS other ... [LINK ext::lib ...] [PRIVATE_LINK ...])
#   the static library weft_<name> of folder src/weft/<name>; DEPS are folders of ours.
# weft_test(name SOURCES a_test.cc ... DEPS folder ... [LINK ...] [LABELS ...] [TIMEOUT s])
#   a GoogleTest program run by ctest as one test. Label `parallel` puts it into the tsan run.

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_C_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

# Warnings are errors in our own code only: third-party headers come in as system headers.
add_library(weft_flags INTERFACE)
target_include_directories(weft_flags INTERFACE ${CMAKE_SOURCE_DIR}/src)
target_compile_options(weft_flags INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Werror)
if(WEFT_SANITIZE)
  # Instrumented code makes g++ 12 see uninitialised values where there are none (in Boost's optionals, say).
  target_compile_options(weft_flags INTERFACE -Wno-maybe-uninitialized)
  target_compile_options(weft_flags INTERFACE -fsanitize=${WEFT_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(weft_flags INTERFACE -fsanitize=${WEFT_SANITIZE})
  if(WEFT_SANITIZE MATCHES "undefined")
    target_compile_options(weft_flags INTERFACE -fno-sanitize-recover=undefined)
  endif()
  if(WEFT_SANITIZE MATCHES "thread")
    # Boost's fences, which it cannot follow: the whole program builds, scripts/test runs the tests that have none.
    target_compile_options(weft_flags INTERFACE -Wno-tsan)
  endif()
endif()

function(weft_library name)
  cmake_parse_arguments(A "" "" "SOURCES;DEPS;LINK;PRIVATE_LINK" ${ARGN})
  add_library(weft_${name} STATIC ${A_SOURCES})
  list(TRANSFORM A_DEPS PREPEND weft_)
  target_link_libraries(weft_${name} PUBLIC weft_flags ${A_DEPS} ${A_LINK} PRIVATE ${A_PRIVATE_LINK})
  set_property(GLOBAL APPEND PROPERTY WEFT_FOLDERS ${name})
endfunction()

function(weft_test name)
  if(NOT WEFT_BUILD_TESTS)
    return()
  endif()
  cmake_parse_arguments(A "" "TIMEOUT" "SOURCES;DEPS;LINK;LABELS" ${ARGN})
  list(TRANSFORM A_DEPS PREPEND weft_)
  add_executable(${name} ${A_SOURCES})
  target_link_libraries(${name} PRIVATE weft_flags ${A_DEPS} ${A_LINK} GTest::gtest GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE WEFT_TEST_DATA="${CMAKE_SOURCE_DIR}/tests/data")
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 300)
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${A_TIMEOUT} LABELS "${A_LABELS}")
  if("parallel" IN_LIST A_LABELS)
    # More rank threads than cores wait for each other with sched_yield: beside another busy process every wait costs a
    # time slice, and seconds become minutes.
    set_tests_properties(${name} PROPERTIES PROCESSORS 64)
  endif()
endfunction()

# weft_mpi_test(name SOURCES ... DEPS folder ... PROCESSES 2 4 [TIMEOUT s])
#   a program with a main of its own, run by mpirun as one test for each number of processes, and with two of them on two
#   hosts (scripts/two_hosts, skipped where those cannot be made); label `mpi`. Where there is no MPI there is no such
#   test.
function(weft_mpi_test name)
  if(NOT WEFT_BUILD_TESTS OR NOT WEFT_HAVE_MPI)
    return()
  endif()
  cmake_parse_arguments(A "" "TIMEOUT" "SOURCES;DEPS;LINK;PROCESSES" ${ARGN})
  list(TRANSFORM A_DEPS PREPEND weft_)
  add_executable(${name} ${A_SOURCES})
  target_link_libraries(${name} PRIVATE weft_flags ${A_DEPS} ${A_LINK} GTest::gtest)
  target_compile_definitions(${name} PRIVATE WEFT_TEST_DATA="${CMAKE_SOURCE_DIR}/tests/data")
  foreach(n ${A_PROCESSES})
    add_test(NAME ${name}_${n} COMMAND ${WEFT_MPIRUN} --oversubscribe --bind-to none -n ${n} $<TARGET_FILE:${name}>)
    weft_mpi_test_properties(${name}_${n} ${A_TIMEOUT})
  endforeach()
  add_test(NAME ${name}_two_hosts COMMAND ${CMAKE_SOURCE_DIR}/scripts/two_hosts --mpirun ${WEFT_MPIRUN}
    mpirun --bind-to none -n 2 $<TARGET_FILE:${name}>)
  weft_mpi_test_properties(${name}_two_hosts ${A_TIMEOUT})
  set_tests_properties(${name}_two_hosts PROPERTIES SKIP_RETURN_CODE 77)
endfunction()

# What a test that starts mpirun needs: the right to do so as root, and alone on the machine, for it shares few cores.
function(weft_mpi_test_properties test)
  if(ARGC GREATER 1)
    set(timeout ${ARGV1})
  else()
    set(timeout 300)
  endif()
  set(environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
  if(WEFT_SANITIZE)
    # What MPI keeps to the end is not ours to free.
    list(APPEND environment ASAN_OPTIONS=detect_leaks=0)
  endif()
  set_tests_properties(${test} PROPERTIES TIMEOUT ${timeout} LABELS mpi RUN_SERIAL TRUE PROCESSORS 64
    ENVIRONMENT "${environment}")
endfunction()
