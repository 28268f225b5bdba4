from hpt_hf.commands.estimate import main

if __name__ == "__main__":
    main()
