from tinyfuse.cli import main

raise SystemExit(main())
