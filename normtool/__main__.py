from normtool.cli import main

main()
