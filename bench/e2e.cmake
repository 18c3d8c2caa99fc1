add_executable(bench_e2e e2e.cc)
target_link_libraries(bench_e2e PRIVATE weft_machine_limits weft_runner)
