"""What `accumops bench` measures: contenders, models and suites."""
