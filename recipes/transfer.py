from hpt_hf.commands.transfer import main

if __name__ == "__main__":
    main()
