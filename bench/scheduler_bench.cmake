find_package(benchmark REQUIRED)
add_executable(bench_scheduler scheduler_bench.cc)
target_link_libraries(bench_scheduler PRIVATE weft_flags weft_scheduler benchmark::benchmark benchmark::benchmark_main)
