"""What is fuzzed: functions of the package that read files, each called as an app calls it."""
