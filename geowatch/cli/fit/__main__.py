from geowatch.cli.fit import main

main()
