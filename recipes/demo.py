from hpt_hf.commands.demo import main

if __name__ == "__main__":
    main()
